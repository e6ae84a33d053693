"""Residuals: how far received records are from those that a validator computes.

The published rule counts mismatches among them; its counts decide nothing here.

Legend of shapes: N nonces, E computations of the validator, P pairs of them.
"""

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from assay import stats
from assay.poc.protocol.records import Record, form_of
from assay.stats.chord import FloatArray

# Honest mismatch rate of distances that the published rule assumes.
P_FLIP = 5e-4
COUNT_ALPHA = 0.01  # level of the published count test
# Distance of two vectors above which the published rule counts a mismatch.
DIST_THRESHOLD = 0.02
# Honest mismatch rate of vectors that the published rule assumes.
P_MISMATCH = 0.001


def residuals(received: Sequence[Record], recomputed: Sequence[Record]) -> FloatArray:
    """Return the residual of every nonce, [N]; :class:`PublishedForm` has one for each form.

    A missing or non-finite value gives NaN, which every test counts as a mismatch.
    """
    return np.array(
        [
            form_of(again).residual(record, again)
            for record, again in zip(received, recomputed, strict=True)
        ],
        np.float64,
    )


def counted_distances(received: Sequence[Record], recomputed: Sequence[Record]) -> FloatArray:
    """Return what the published count holds against its threshold, [N]; NaN as of residuals."""
    pairs = zip(received, recomputed, strict=True)
    forms = [(form_of(again), record, again) for record, again in pairs]
    return np.array([(form.counted or form.residual)(*pair) for form, *pair in forms], np.float64)


def compare(
    received: Sequence[Record], computations: Sequence[Sequence[Record]]
) -> tuple[FloatArray, FloatArray]:
    """Return a node's residuals from each own computation, [E, N], and between these, [P, N]."""
    between_PN = [residuals(first, second) for first, second in combinations(computations, 2)]
    return np.stack([residuals(received, records) for records in computations]), np.stack(
        between_PN
    )


def published_rule(
    received: Sequence[float], recomputed: Sequence[float], r_target: float
) -> stats.CountTest:
    """Apply the published rule: fraud if a binomial test against 5e-4 gives p < 0.01.

    A mismatch is a received distance at or above ``r_target``, a recomputed one above it, or one
    that is not finite.
    """
    mismatches = sum(
        not (math.isfinite(a) and a < r_target and b <= r_target)
        for a, b in zip(received, recomputed, strict=True)
    )
    return stats.count_test(mismatches, len(received), P_FLIP, COUNT_ALPHA)


def count_mismatches(
    distances: FloatArray,
    *,
    threshold: float = DIST_THRESHOLD,
    p_mismatch: float = P_MISMATCH,
    alpha: float = COUNT_ALPHA,
) -> stats.CountTest:
    """Count vectors [N] whose distance is above the threshold or not finite, and test it."""
    mismatches = int(np.count_nonzero(~(distances <= threshold)))
    return stats.count_test(mismatches, len(distances), p_mismatch, alpha)
