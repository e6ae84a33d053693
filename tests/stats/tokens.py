"""Tokens drawn from a law, for tests."""

import math

import numpy as np

from assay.stats import TokenNoise
from assay.stats.tokens import COLUMNS, SCALES, token_profile

VOCABULARY = 48


def law_at(*scales: float) -> TokenNoise:
    """The law with these scales in equal shares, and few stray tokens."""
    weights = np.full(COLUMNS, 1e-5)
    weights[[int(np.argmin(np.abs(SCALES - scale))) for scale in scales]] = 1 / len(scales)
    return TokenNoise(tuple((weights / weights.sum()).tolist()))


def drawn(
    clusters: int, tokens: int, law: TokenNoise, *, between: float = 0.0, multiple: float = 1.0, seed: int = 0
) -> list[np.ndarray]:
    """Profiles of tokens of a prover whose scores differ from the verifier's as a law says, times a multiple."""
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
