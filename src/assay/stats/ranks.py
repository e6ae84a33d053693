"""Scores by their ranks: the area under the ROC curve."""

import numpy as np
import numpy.typing as npt

from assay.errors import UsageError
from assay.stats.chord import FloatArray


def auroc(positive: npt.ArrayLike, negative: npt.ArrayLike) -> float:
    """Return the probability that a positive scores above a negative, a tie counting one half.

    Equals the area under the ROC curve, from the negatives [N] below each positive [P] (Mann and
    Whitney 1947). A UsageError refuses a side that is empty or has a non-finite score.
    """
    positive_P = _finite(positive, "positive scores")
    negative_N = _finite(negative, "negative scores")
    ordered_N = np.sort(negative_N)
    below = ordered_N.searchsorted(positive_P, "left").sum()
    up_to = ordered_N.searchsorted(positive_P, "right").sum()
    return float((below + up_to) / 2 / (positive_P.size * negative_N.size))


def _finite(values: npt.ArrayLike, name: str) -> FloatArray:
    values_N = np.asarray(values, dtype=np.float64)
    if values_N.ndim != 1 or not values_N.size or not np.isfinite(values_N).all():
        raise UsageError(
            f"{name} of shape {values_N.shape}",
            wanted="a non-empty list of finite numbers",
            do="drop or repair the samples without a score",
        )
    return values_N
