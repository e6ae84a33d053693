"""The published rule: counts of mismatches, which decide nothing here."""

from collections.abc import Sequence

import numpy as np

from assay import stats

# Honest mismatch rate of distances that the published rule assumes.
P_FLIP = 5e-4
COUNT_ALPHA = 0.01  # level of the published count test
# Distance of two vectors above which the published rule counts a mismatch.
DIST_THRESHOLD = 0.02
# Honest mismatch rate of vectors that the published rule assumes.
P_MISMATCH = 0.001


def published_rule(
    received: Sequence[float], recomputed: Sequence[float], r_target: float
) -> stats.CountTest:
    """Apply the published rule: fraud if a binomial test against 5e-4 gives p < 0.01.

    A mismatch is a received distance at or above ``r_target``, a recomputed one above it, or one
    that is not finite.
    """
    mismatches = sum(
        not (a < r_target and b <= r_target) for a, b in zip(received, recomputed, strict=True)
    )
    return stats.count_test(mismatches, len(received), P_FLIP, COUNT_ALPHA)


def count_mismatches(
    distances: np.ndarray,
    *,
    threshold: float = DIST_THRESHOLD,
    p_mismatch: float = P_MISMATCH,
    alpha: float = COUNT_ALPHA,
) -> stats.CountTest:
    """Count vectors [N] whose distance is above the threshold or not finite, and test it."""
    mismatches = int(np.count_nonzero(~(distances <= threshold)))
    return stats.count_test(mismatches, len(distances), p_mismatch, alpha)
