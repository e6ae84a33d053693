"""What counts: which distances are valid, which numbers can be distances, and which nonces can share a proof."""

from collections.abc import Iterable
from itertools import islice

import numpy as np
from scipy import stats as distributions

from assay import streams
from assay.errors import ProofMismatch
from assay.poc.protocol._round import Round

__all__ = ["MAX_DISTANCE", "check_distinct_seeds", "is_distance", "is_valid"]

MAX_DISTANCE = 2 + 1e-6
"""Largest distance that is accepted.

Points of the unit sphere are at most 2 apart. Both vectors are scaled to length one in float32, so each may be a few
units in the last place too long (1.2e-7 each), and the norm of their difference may round up once more.
"""

CHANCE = 1e-4  # that honest nonces are refused because their seeds happen to collide
CHUNK = 2**16


def is_valid(distance: float, r_target: float) -> bool:
    """Return whether a nonce counts: its distance is strictly below the target."""
    return distance < r_target


def is_distance(value: float) -> bool:
    """Return whether a number can be a distance: finite and between 0 and :data:`MAX_DISTANCE`."""
    return 0 <= value <= MAX_DISTANCE


def check_distinct_seeds(round: Round, nonces: Iterable[int]) -> None:
    """Refuse nonces of which one forward pass would serve several, because their 32-bit input seeds collide.

    A node that may choose its nonces finds such groups by hashing alone. Among n nonces that were not chosen for it,
    n(n − 1)/2³³ pairs collide by chance. More repeated seeds than chance gives once in ten thousand are refused: any
    at all in up to 927 nonces. Seeds of 256 bits do not collide.

    Args:
        round: Round that the nonces belong to, with the key of the node that proves.
        nonces: Nonces of one proof or of one request, each once.

    Raises:
        ProofMismatch: Too many of the seeds are equal; names two nonces that share one.
    """
    if round.strength != 32:
        return
    given = iter(nonces)
    chunks = iter(lambda: list(islice(given, CHUNK)), [])
    parts = [(chunk, streams.seeds(round.texts("inputs", chunk))[:, 0]) for chunk in chunks]
    if not parts:
        return
    nonces_N = np.concatenate([np.array(chunk, dtype=np.int64) for chunk, _ in parts])
    seeds_N = np.concatenate([seeds for _, seeds in parts])
    order_N = np.argsort(seeds_N, kind="stable")
    equal = np.flatnonzero(np.diff(seeds_N[order_N]) == 0)
    pairs = nonces_N.size * (nonces_N.size - 1) / 2
    if equal.size > distributions.poisson.isf(CHANCE, pairs / 2**32):
        one, other = nonces_N[order_N[equal[0] : equal[0] + 2]]
        raise ProofMismatch(
            f"{equal.size} of {nonces_N.size} nonces with the input seed of another one, such as {one} and {other}",
            wanted="an input seed of its own for every nonce: one forward pass must not serve two of them",
            do="ask the node for consecutive nonces of its share, or agree on --strength 256",
        )
