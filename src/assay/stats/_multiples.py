"""The multiples of honest noise that the tests look for."""

import math
from collections.abc import Sequence

import numpy as np

from assay.stats._chord import FloatArray

CHEAP = 5.0
"""Multiple of honest noise at which a share of the nonces counts as computed cheaply."""

FAR = 16.0
"""Multiple beyond which neighbours are further apart."""

NAMED_WEIGHT = 0.25
"""Weight in an e-value of all named alternatives together."""


def multiples(low: float, high: float, also: Sequence[float] = ()) -> FloatArray:
    """Return the multiples from ``low`` to ``high`` and those besides, in ascending order, [M].

    Neighbours are at most a factor of two apart, and far out four, where honest noise explains either no better:
    between two of them the loss of evidence per value is small, and every multiple costs the others some weight.
    """
    near = max(min(FAR, high), low)
    return np.unique(np.concatenate([_grid(low, near, 2.0), _grid(near, high, 4.0), also]))


def _grid(low: float, high: float, factor: float) -> FloatArray:
    return np.geomspace(low, high, math.ceil(math.log(high / low) / math.log(factor)) + 1) if low < high else np.ones(0)
