"""How well scores separate two classes."""

import numpy as np
import numpy.typing as npt
from scipy import stats

from assay.errors import UsageError

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
