"""What a verification returns: numbers first, and the verdict that follows from them."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from assay import stats
from assay.poc.protocol import Header, Pins
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
        verdict: Outcome of the sequential test: honest, fraud, or undecided.
        reason: Numbers that decided, in one sentence.
        checked: Number of recomputed nonces.
        proved: Number of nonces in the proof.
        sequential: Sequential test on the residuals (distances) or on their logarithms (vectors).
        count: Published rule: flips across r_target, or vectors further off than the threshold.
        noise: Honest noise that was assumed, and where it comes from.
        residuals: Received minus recomputed distance, or L2 distance of the vectors, per checked nonce.
        nonces: Nonces that were checked.
        sample_seed: Number that draws the same sample again.
        header: Header of the proof, every value of which agrees with the pins.
        pins: Values that the validator gave.
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
    header: Header
    pins: Pins

    @property
    def honest(self) -> bool:
        """Whether the verdict is honest."""
        return self.verdict == "honest"

    @property
    def fraud(self) -> bool:
        """Whether the verdict is fraud."""
        return self.verdict == "fraud"

    @property
    def unpinned(self) -> tuple[str, ...]:
        """Names of the values that were taken on the prover's word, by the names of :class:`Pins`."""
        return self.pins.unpinned(self.header)

    @property
    def exit_code(self) -> int:
        """0 for an honest proof of which nothing was taken on the prover's word, 1 for fraud, 2 for anything else."""
        return 2 if self.honest and self.unpinned else EXIT_CODES[self.verdict]

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON-ready values; a residual that is not a number is null."""
        header = self.header
        values = asdict(self) | {"noise": self.noise.as_dict()}
        values["residuals"] = [value if math.isfinite(value) else None for value in self.residuals]
        del values["header"], values["pins"]
        stated = {name: getattr(header.round, name) for name in ("block_hash", "public_key", "model", "preset")}
        stated |= {"digest": header.digest, "dtype": header.fingerprint.dtype}
        believed = {"pinned": self.pins.given, "unpinned": self.unpinned}
        return {"schema": "assay.poc.verdict/1", **values, **stated, **believed}


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
