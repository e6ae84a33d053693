"""What a verification returns: numbers first, and the verdict that follows from them."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from assay import stats
from assay.poc.verdict._noise import Noise

__all__ = ["COUNT_ALPHA", "P_FLIP", "Verdict", "count_mismatches", "published_rule"]

P_FLIP = 5e-4  # honest mismatch rate that the published rule assumes
COUNT_ALPHA = 0.01
DIST_THRESHOLD = 0.02  # published defaults of the vector count test
P_MISMATCH = 0.001

EXIT_CODES: dict[stats.Verdict, int] = {"honest": 0, "fraud": 1, "undecided": 2}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of a verification.

    Args:
        verdict: honest, fraud, or undecided. It is the sequential test's.
        reason: the numbers that decided, in one sentence.
        checked: nonces recomputed.
        proved: nonces in the proof.
        sequential: the sequential test on the residuals (distances) or on their logarithms (vectors).
        count: the published rule: flips across r_target, or vectors further off than the threshold.
        noise: the honest noise that was assumed, and where it comes from.
        residuals: received minus recomputed distance, or L2 distance of the vectors, per checked nonce.
        nonces: the nonces that were checked.
        sample_seed: draws the same sample again.
    """

    verdict: stats.Verdict
    reason: str
    checked: int
    proved: int
    sequential: stats.SequentialResult
    count: stats.CountTest
    noise: Noise
    residuals: tuple[float, ...]
    nonces: tuple[int, ...]
    sample_seed: int

    @property
    def honest(self) -> bool:
        """Whether the verdict is honest."""
        return self.verdict == "honest"

    @property
    def fraud(self) -> bool:
        """Whether the verdict is fraud."""
        return self.verdict == "fraud"

    @property
    def exit_code(self) -> int:
        """0 honest, 1 fraud, 2 undecided."""
        return EXIT_CODES[self.verdict]

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON-ready values; a residual that is not a number is null."""
        values = asdict(self) | {"noise": self.noise.as_dict()}
        values["residuals"] = [value if math.isfinite(value) else None for value in self.residuals]
        return {"schema": "assay.poc.verdict/1", **values}


def published_rule(received: Sequence[float], recomputed: Sequence[float], r_target: float) -> stats.CountTest:
    """Apply the published rule to nonces that were claimed valid.

    A mismatch is a received distance at or above ``r_target``, or a recomputed one above it. A value
    that is not finite is a mismatch. Fraud if a binomial test of the count against 5e-4 gives p < 0.01.
    """
    pairs = zip(received, recomputed, strict=True)
    mismatches = sum(not (a < r_target and b <= r_target) for a, b in pairs)
    return stats.count_test(mismatches, len(received), P_FLIP, COUNT_ALPHA)


def count_mismatches(
    distances: np.ndarray,
    *,
    threshold: float = DIST_THRESHOLD,
    p_mismatch: float = P_MISMATCH,
    alpha: float = COUNT_ALPHA,
) -> stats.CountTest:
    """Count vectors [N] whose L2 distance is above the threshold or not finite, and test the count."""
    mismatches = int(np.count_nonzero(~(distances <= threshold)))
    return stats.count_test(mismatches, len(distances), p_mismatch, alpha)
