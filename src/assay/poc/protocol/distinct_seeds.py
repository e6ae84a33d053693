"""Input seeds that collide: nonces of which one forward pass would serve several."""

from collections.abc import Iterable

import numpy as np
import scipy

from assay import streams
from assay.errors import ProofMismatch
from assay.poc.protocol.round import Round

# Chance that honest nonces are refused because their seeds happen to collide.
CHANCE = 1e-4
# Nonces whose texts are held at once: the texts take far more room than the seeds.
CHUNK = 2**16


def check_distinct_seeds(round: Round, nonces: Iterable[int]) -> None:
    """Refuse nonces whose 32-bit input seeds collide: one forward pass would serve several.

    A node that may choose its nonces finds such groups by hashing alone. Among n nonces that were
    not chosen for it, n(n − 1)/2³³ pairs collide by chance. More repeated seeds than chance gives
    once in ten thousand are refused: any at all in up to 927 nonces. Seeds of 256 bits do not
    collide. A ProofMismatch names two nonces that share one.
    """
    if round.strength != 32:
        return
    nonces_N = np.fromiter(nonces, dtype=np.int64)
    parts = np.array_split(nonces_N, nonces_N.size // CHUNK + 1)
    seeds_N = np.concatenate(
        [streams.seeds(round.texts("inputs", part.tolist()))[:, 0] for part in parts]
    )
    order_N = np.argsort(seeds_N, kind="stable")
    equal = np.flatnonzero(np.diff(seeds_N[order_N]) == 0)
    pairs = nonces_N.size * (nonces_N.size - 1) / 2
    if equal.size and equal.size > scipy.stats.poisson.isf(CHANCE, pairs / 2**32):
        first, second = nonces_N[order_N[equal[0] : equal[0] + 2]]
        raise ProofMismatch(
            f"{equal.size} of {nonces_N.size} nonces with the input seed of another one, such as "
            f"{first} and {second}",
            wanted=(
                "an input seed of its own for every nonce: one forward pass must not serve two of "
                "them"
            ),
            do="ask the node for consecutive nonces of its share, or agree on strength = 256 in "
            "the pins",
            field="nonces",
        )
