"""The count test of the published protocol, and the interval of a measured share."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from assay.errors import UsageError


@dataclass(frozen=True, slots=True)
class CountTest:
    """Outcome of `count_test`.

    Attributes:
        n: nonces checked.
        mismatches: how many of them did not match.
        p_value: probability of at least so many mismatches from an honest node.
        fraud: whether ``p_value`` is below alpha.
    """

    n: int
    mismatches: int
    p_value: float
    fraud: bool


def _check_counts(count: int, n: int) -> None:
    if not 0 <= count <= n:
        raise UsageError(f"{count} of {n}", wanted="0 ≤ count ≤ n", do="check how the two were counted")


def _check_share(value: float, name: str) -> None:
    if not 0.0 <= value <= 1.0:
        raise UsageError(f"{name} {value}", wanted="a number in [0, 1]", do=f"choose another {name}")


def count_test(mismatches: int, n: int, p_mismatch: float, alpha: float) -> CountTest:
    """One-sided binomial test: are there more mismatches than an honest node makes?

    Args:
        mismatches: nonces that did not match.
        n: nonces checked; with none there is no evidence, so the p-value is 1.
        p_mismatch: probability that an honest nonce mismatches.
        alpha: fraud is declared when the p-value is strictly below it.

    Raises:
        UsageError: a count or probability is out of range.
    """
    _check_counts(mismatches, n)
    _check_share(p_mismatch, "p_mismatch")
    _check_share(alpha, "alpha")
    p_value = float(stats.binomtest(mismatches, n, p_mismatch, "greater").pvalue) if n else 1.0
    return CountTest(n=n, mismatches=mismatches, p_value=p_value, fraud=p_value < alpha)


def proportion_interval(
    count: int, n: int, confidence: float = 0.95, method: Literal["exact", "wilson"] = "exact"
) -> tuple[float, float]:
    """Confidence interval of a share: ``exact`` is Clopper-Pearson, ``wilson`` the shorter score interval.

    With n = 0 nothing is known and the interval is (0, 1).

    Raises:
        UsageError: a count or the confidence is out of range.
    """
    _check_counts(count, n)
    _check_share(confidence, "confidence")
    if n == 0:
        return 0.0, 1.0
    interval = stats.binomtest(count, n).proportion_ci(confidence, method)
    return float(interval.low), float(interval.high)


FloatArray = npt.NDArray[np.float64]


def _finite(values: npt.ArrayLike, name: str) -> FloatArray:
    values_N = np.asarray(values, dtype=np.float64)
    if values_N.ndim != 1 or not values_N.size or not np.isfinite(values_N).all():
        raise UsageError(
            f"{name} of shape {values_N.shape}",
            wanted="a non-empty list of finite numbers",
            do="drop or repair the samples without a score",
        )
    return values_N


def auroc(positive: npt.ArrayLike, negative: npt.ArrayLike) -> float:
    """Probability that a positive scores above a negative, a tie counting one half.

    Equals the area under the ROC curve, computed from mid-ranks (Mann and Whitney 1947).

    Args:
        positive: scores of the positive class, [P].
        negative: scores of the negative class, [N].

    Raises:
        UsageError: a side is empty or holds a non-finite score.
    """
    positive_P, negative_N = _finite(positive, "positive scores"), _finite(negative, "negative scores")
    ranks = stats.rankdata(np.concatenate([positive_P, negative_N]))
    p, n = positive_P.size, negative_N.size
    return float((ranks[:p].sum() - p * (p + 1) / 2) / (p * n))


def paired_accuracy(positive: npt.ArrayLike, negative: npt.ArrayLike) -> float:
    """Share of pairs whose positive side scores above its negative side, a tie counting one half.

    Args:
        positive: scores of the positive sides, [N].
        negative: scores of the negative sides in the same order, [N].

    Raises:
        UsageError: sides of different length, empty, or with a non-finite score.
    """
    positive_N, negative_N = _finite(positive, "positive scores"), _finite(negative, "negative scores")
    if positive_N.size != negative_N.size:
        raise UsageError(
            f"{positive_N.size} positive and {negative_N.size} negative scores",
            wanted="one of each per pair",
            do="keep both sides of a pair",
        )
    return float(np.mean(positive_N > negative_N) + np.mean(positive_N == negative_N) / 2)
