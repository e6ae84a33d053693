"""Sums of likelihoods that are kept as logarithms."""

import numpy as np

from assay.stats._chord import FloatArray


def log_sum(path: FloatArray) -> FloatArray:
    """Return the logarithm of the sum of exp over the last axis, which has finite values."""
    top = path.max(axis=-1, keepdims=True)
    return np.asarray(top[..., 0] + np.log(np.exp(path - top).sum(axis=-1)), dtype=np.float64)
