"""Shares, ranks and their intervals: the published count test, AUROC, and resampling of whole
groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy

from assay.errors import UsageError
from assay.stats.chord import TAIL, FloatArray

_Array = npt.NDArray[np.generic]
_REDRAWS = 100  # of groups that leave a sample empty
_DRAWS = 20_000
_AT_ONCE = 1000  # of the weights of groups: in all, and held in memory together


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


def count_test(mismatches: int, n: int, p_mismatch: float, alpha: float) -> CountTest:
    """Test whether there are more mismatches than an honest node makes, by the one-sided binomial
    test.

    Args:
        mismatches: Number of nonces that did not match.
        n: Number of nonces checked; with none there is no evidence, so the p-value is 1.
        p_mismatch: Probability that an honest nonce mismatches.
        alpha: Bound strictly below which a p-value means fraud.

    Raises:
        UsageError: A count or probability is out of range.
    """
    _check_counts(mismatches, n, p_mismatch=p_mismatch, alpha=alpha)
    p_value = (
        float(scipy.stats.binomtest(mismatches, n, p_mismatch, "greater").pvalue) if n else 1.0
    )
    return CountTest(n=n, mismatches=mismatches, p_value=p_value, fraud=p_value < alpha)


def proportion_interval(count: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the confidence interval of a share by Clopper and Pearson; with n = 0 nothing is
    known, so it is (0, 1).

    A UsageError refuses a count or a confidence out of range.
    """
    _check_counts(count, n, confidence=confidence)
    if n == 0:
        return 0.0, 1.0
    interval = scipy.stats.binomtest(count, n).proportion_ci(confidence)
    return float(interval.low), float(interval.high)


def _finite(values: npt.ArrayLike, name: str) -> FloatArray:
    values_N = np.asarray(values, dtype=np.float64)
    if values_N.ndim != 1 or not values_N.size or not np.isfinite(values_N).all():
        wanted = "a non-empty list of finite numbers"
        do = "drop or repair the samples without a score"
        raise UsageError(f"{name} of shape {values_N.shape}", wanted=wanted, do=do)
    return values_N


def auroc(positive: npt.ArrayLike, negative: npt.ArrayLike) -> float:
    """Return the probability that a positive scores above a negative, a tie counting one half.

    Equals the area under the ROC curve, from the negatives [N] below each positive [P] (Mann and
    Whitney 1947). A UsageError refuses a side that is empty or holds a non-finite score.
    """
    positive_P = _finite(positive, "positive scores")
    negative_N = _finite(negative, "negative scores")
    ordered_N = np.sort(negative_N)
    below, up_to = (ordered_N.searchsorted(positive_P, side).sum() for side in ("left", "right"))
    return float((below + up_to) / 2 / (positive_P.size * negative_N.size))


@dataclass(frozen=True, slots=True)
class BootstrapInterval:
    """A statistic on the data as measured, and both ends of its percentile interval."""

    value: float
    low: float
    high: float


def group_bootstrap(
    statistic: Callable[..., float],
    samples: Sequence[npt.ArrayLike],
    groups: Sequence[Sequence[object]],
    *,
    n_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> BootstrapInterval:
    """Return a statistic with the interval of its percentile bootstrap over groups.

    Samples of one group (the same task, the same block) resemble each other. Drawing single samples
    would treat them as independent and make every interval too short. So each resample draws whole
    groups with replacement, as many as there are; a group drawn twice gives its rows twice. The
    draw is common to all samples, so pairs stay pairs.

    Args:
        statistic: Function that is called as ``statistic(*samples)``, with arrays of the same rank
            as given.
        samples: Arrays whose first axis runs over rows, for example (scores of hacks, scores of
            clean).
        groups: Group label of every row, per sample.
        n_resamples: Number of draws.
        seed: Seed of numpy's default generator; the same seed gives the same interval.
        confidence: Nominal coverage.

    Raises:
        UsageError: Labels and rows differ in number, there are fewer than 2 groups, no draw fills
            every sample, or the statistic is not a number for the samples or for a draw.
    """
    arrays = [np.asarray(sample) for sample in samples]
    rows = _rows_of_groups(arrays, groups)
    if n_resamples < 1 or not 0.0 < confidence < 1.0:
        seen = f"{n_resamples} resamples, confidence {confidence}"
        raise UsageError(
            seen, wanted="at least 1 resample and a confidence in (0, 1)", do="use the defaults"
        )
    generator = np.random.default_rng(seed)
    found = float(statistic(*arrays))
    draws = [statistic(*_resample(arrays, rows, generator)) for _ in range(n_resamples)]
    without = np.count_nonzero(np.isnan([found, *draws]))
    if without:
        seen = (
            f"a statistic that is not a number in {without} of {n_resamples} draws and the "
            f"samples themselves"
        )
        do = "leave rows without a number out, or choose a statistic that every draw has"
        raise UsageError(seen, wanted="a number for every draw of groups", do=do)
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return BootstrapInterval(found, float(low), float(high))


def grouped_share_interval(shares: npt.ArrayLike, groups: Sequence[object]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean share of a group, where shares of one group
    resemble each other.

    Each group counts once, with the mean of its shares. The ends are Gaffke's bounds for means in
    [0, 1] (Gaffke 2005; Learned-Miller and Thomas 2019): quantiles of the mean of the groups and of
    one more at the end of the range, with random weights. If every group is at 0 or 1, that is the
    exact interval of so many groups. If groups agree, it is narrower. If no share or hardly any is
    above 0, it stays wide, because few groups may miss rare ones: with seven groups, a bootstrap
    holds the truth in half of the cases (tests/stats/test_rates.py). For a single group the
    interval is (0, 1).

    The shares [N] are in [0, 1], such as that of a pair's audits that accuse, or marks that are 0
    or 1. A UsageError refuses others, and labels that differ from them in number.
    """
    share_N = np.asarray(shares, dtype=np.float64)
    outside = np.count_nonzero(~((share_N >= 0) & (share_N <= 1)))
    if outside or len(share_N) != len(groups):
        seen = (
            f"{len(share_N)} shares, {outside} of them outside [0, 1], with {len(groups)} group "
            f"labels"
        )
        do = "pass shares and labels of equal length"
        raise UsageError(seen, wanted="shares in [0, 1], with one label for each", do=do)
    if len(set(groups)) < 2:
        return 0.0, 1.0
    mean_G = np.array([share_N[rows].mean() for (rows,) in _rows_of_groups([share_N], [groups])])
    if np.isin(mean_G, (0, 1)).all():
        return proportion_interval(int(mean_G.sum()), len(mean_G))
    generator = np.random.default_rng(0)
    low = []
    high = []
    for _ in range(_DRAWS // _AT_ONCE):
        weights_RG = generator.exponential(size=(_AT_ONCE, len(mean_G) + 1))
        below_R = weights_RG[:, :-1] @ mean_G / weights_RG.sum(axis=1)
        low.append(below_R)
        high.append(below_R + weights_RG[:, -1] / weights_RG.sum(axis=1))
    # Both ends grow with the shares; what was drawn at random must not say otherwise.
    most_low = proportion_interval(len(mean_G), len(mean_G))[0]
    least_high = proportion_interval(0, len(mean_G))[1]
    return min(float(np.quantile(low, TAIL)), most_low), max(
        float(np.quantile(high, 1 - TAIL)), least_high
    )


def _rows_of_groups(
    arrays: Sequence[_Array], groups: Sequence[Sequence[object]]
) -> list[list[list[int]]]:
    """Return the rows of every group in every sample."""
    counts = [len(array) for array in arrays], [len(side) for side in groups]
    if counts[0] != counts[1]:
        seen = f"{counts[0]} rows with {counts[1]} group labels"
        raise UsageError(
            seen,
            wanted="one label per row in every sample",
            do="pass groups in the order of the samples",
        )
    rows: dict[object, list[list[int]]] = {}
    for sample, side in enumerate(groups):
        for row, label in enumerate(side):
            rows.setdefault(label, [[] for _ in groups])[sample].append(row)
    if len(rows) < 2:
        raise UsageError(
            f"{len(rows)} group",
            wanted="at least 2 groups to draw from",
            do="add data of other groups",
        )
    return list(rows.values())


def _resample(
    arrays: Sequence[_Array],
    rows: Sequence[Sequence[Sequence[int]]],
    generator: np.random.Generator,
) -> list[_Array]:
    for _ in range(_REDRAWS):
        drawn = generator.integers(len(rows), size=len(rows))
        taken = [[row for g in drawn for row in rows[g][sample]] for sample in range(len(arrays))]
        if all(taken):
            return [array[index] for array, index in zip(arrays, taken, strict=True)]
    seen = f"{_REDRAWS} draws of {len(rows)} groups that left a sample empty"
    raise UsageError(
        seen, wanted="samples that share most groups", do="check the group labels of every sample"
    )
