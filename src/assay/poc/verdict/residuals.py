"""Residuals: how far received records are from those that a validator computes.

Legend of shapes: N nonces, E computations of the validator, P pairs of them.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from assay.poc.protocol.records import Record, form_of

FloatArray = npt.NDArray[np.float64]


def residuals(received: Sequence[Record], recomputed: Sequence[Record]) -> FloatArray:
    """Return the residual of every nonce, [N]; :class:`PublishedForm` has one for each form.

    A missing or non-finite value gives NaN, which every test counts as a mismatch.
    """
    pairs = zip(received, recomputed, strict=True)
    return np.array([form_of(again).residual(record, again) for record, again in pairs], np.float64)


def counted_distances(received: Sequence[Record], recomputed: Sequence[Record]) -> FloatArray:
    """Return what the published count holds against its threshold, [N]; NaN as of residuals."""
    pairs = zip(received, recomputed, strict=True)
    forms = [(form_of(again), record, again) for record, again in pairs]
    return np.array([(form.counted or form.residual)(*pair) for form, *pair in forms], np.float64)


def compare(
    received: Sequence[Record], computations: Sequence[Sequence[Record]]
) -> tuple[FloatArray, FloatArray]:
    """Return a node's residuals from each own computation, [E, N], and between these, [P, N]."""
    between_PN = [residuals(first, second) for first, second in combinations(computations, 2)]
    return np.stack([residuals(received, records) for records in computations]), np.stack(
        between_PN
    )
