"""Tokens drawn from a law, for tests."""

import math

import numpy as np
import numpy.typing as npt
from scipy import special

from assay.stats import TokenNoise
from assay.stats.chord import FloatArray
from assay.stats.token_law import COLUMNS, SCALES, round_profiles

VOCABULARY = 48


def token_profile(gaps_NV: npt.ArrayLike, tokens_N: npt.ArrayLike) -> FloatArray:
    """Return profiles [N, G] of claimed tokens from the gaps of all; one that cannot be taken has
    an infinite gap.

    This is the definition, to be read, and the twin of what ``assay.poc.responses.replaying``
    computes on devices.
    """
    gaps: FloatArray = np.asarray(gaps_NV, dtype=np.float64)
    tokens: npt.NDArray[np.int64] = np.asarray(tokens_N, dtype=np.int64)
    own_N = gaps[np.arange(len(gaps)), tokens]
    logs = [-own_N / scale - special.logsumexp(-gaps / scale, axis=1) for scale in SCALES]
    stray = np.full(len(gaps), -math.log(gaps.shape[1]))
    return round_profiles(np.column_stack([*logs, stray]))


def law_at(*scales: float) -> TokenNoise:
    """The law with these scales in equal shares, and few stray tokens."""
    weights = np.full(COLUMNS, 1e-5)
    weights[[int(np.argmin(np.abs(SCALES - scale))) for scale in scales]] = 1 / len(scales)
    return TokenNoise(tuple((weights / weights.sum()).tolist()))


def drawn(
    clusters: int,
    tokens: int,
    law: TokenNoise,
    *,
    between: float = 0.0,
    multiple: float = 1.0,
    seed: int = 0,
) -> list[np.ndarray]:
    """Profiles of tokens of a prover whose scores differ from the verifier's as a law says, times a
    multiple.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(clusters):
        own = law.scaled(multiple * math.exp(between * rng.standard_normal()))
        scores = rng.normal(0, 2, (tokens, VOCABULARY)) + rng.gumbel(size=(tokens, VOCABULARY))
        gaps = scores.max(axis=1, keepdims=True) - scores
        chosen = rng.choice(COLUMNS, size=tokens, p=own.weights)
        scale = np.append(SCALES, math.inf)[chosen][:, None]
        chances = np.exp(-gaps / scale)
        chances /= chances.sum(axis=1, keepdims=True)
        claimed = (chances.cumsum(axis=1) > rng.random((tokens, 1))).argmax(axis=1)
        found.append(token_profile(gaps, claimed))
    return found
