"""Rates and their confidence intervals: the published count test, and shares of whole groups.

Suffixes: N shares, G groups, R draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy

from assay.errors import UsageError
from assay.stats.bootstrap import rows_of_groups

_DRAWS = 20_000  # of the weights of groups
_DRAWS_AT_ONCE = 1000  # which are in memory together


@dataclass(frozen=True, slots=True)
class CountTest:
    """The outcome of `count_test`: fraud where the p-value is below alpha.

    The p-value is the probability that an honest node has at least this number of mismatches among
    n checked nonces.
    """

    n: int
    mismatches: int
    p_value: float
    fraud: bool


def count_test(mismatches: int, n: int, p_mismatch: float, alpha: float) -> CountTest:
    """Test for more mismatches than an honest node makes, by the one-sided binomial test.

    Args:
        mismatches: Number of nonces that did not match.
        n: Number of nonces checked; with none there is no evidence, so the p-value is 1.
        p_mismatch: Probability that an honest nonce mismatches.
        alpha: Bound strictly below which a p-value means fraud.

    Raises:
        UsageError: A count or probability is out of range.
    """
    _check_counts(mismatches, n, p_mismatch=p_mismatch, alpha=alpha)
    p_value = 1.0
    if n:
        p_value = float(scipy.stats.binomtest(mismatches, n, p_mismatch, "greater").pvalue)
    return CountTest(n=n, mismatches=mismatches, p_value=p_value, fraud=p_value < alpha)


def proportion_interval(count: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the confidence interval of a share by Clopper and Pearson; (0, 1) for n = 0.

    A UsageError refuses a count or a confidence out of range.
    """
    _check_counts(count, n, confidence=confidence)
    if n == 0:
        return 0.0, 1.0
    interval = scipy.stats.binomtest(count, n).proportion_ci(confidence)
    return float(interval.low), float(interval.high)


def _check_counts(count: int, n: int, **shares: float) -> None:
    if not 0 <= count <= n:
        raise UsageError(
            f"{count} of {n}", wanted="0 ≤ count ≤ n", do="check how the two were counted"
        )
    for name, value in shares.items():
        if not 0.0 <= value <= 1.0:
            raise UsageError(
                f"{name} {value}", wanted="a number in [0, 1]", do=f"choose another {name}"
            )


def grouped_share_interval(shares: npt.ArrayLike, groups: Sequence[object]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean share of a group.

    Shares of one group resemble each other, so each group counts once, with the mean of its shares.
    The ends are Gaffke's bounds for means in [0, 1] (Gaffke 2005; Learned-Miller and Thomas 2019):
    quantiles of the mean of the groups and of one more at the end of the range, with random
    weights. If every group is at 0 or 1, that is the exact interval of so many groups. If groups
    agree, it is narrower. If no share or hardly any is above 0, it stays wide, because few groups
    may miss rare ones: with seven groups, a bootstrap contains the truth in half of the cases
    (tests/stats/test_rates.py). For a single group the interval is (0, 1).

    The shares [N] are in [0, 1], such as that of a pair's audits that accuse, or marks that are 0
    or 1. A UsageError refuses others, and labels that differ from them in number.
    """
    share_N = np.asarray(shares, dtype=np.float64)
    outside = np.count_nonzero(~((share_N >= 0) & (share_N <= 1)))
    if outside or len(share_N) != len(groups):
        raise UsageError(
            f"{len(share_N)} shares, {outside} of them outside [0, 1], with {len(groups)} group "
            f"labels",
            wanted="shares in [0, 1], with one label for each",
            do="pass shares and labels of equal length",
        )
    if len(set(groups)) < 2:
        return 0.0, 1.0
    mean_G = np.array([share_N[rows].mean() for (rows,) in rows_of_groups([share_N], [groups])])
    count = len(mean_G)
    # Groups that are all at 0 or 1 are coins, for which the interval is exact.
    if np.isin(mean_G, (0, 1)).all():
        return proportion_interval(int(mean_G.sum()), count)
    # The same shares always have the same interval.
    generator = np.random.default_rng(0)
    # Means of the groups and one more of 0.
    with_zero = []
    with_one = []
    for _ in range(_DRAWS // _DRAWS_AT_ONCE):
        weights_RG = generator.exponential(size=(_DRAWS_AT_ONCE, count + 1))
        total_R = weights_RG.sum(axis=1)
        with_zero_R = weights_RG[:, :-1] @ mean_G / total_R
        with_zero.append(with_zero_R)
        with_one.append(with_zero_R + weights_RG[:, -1] / total_R)
    # Both ends grow with the shares; random weights must not say otherwise.
    return (
        min(float(np.quantile(with_zero, 0.025)), proportion_interval(count, count)[0]),
        max(float(np.quantile(with_one, 0.975)), proportion_interval(0, count)[1]),
    )
