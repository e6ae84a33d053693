"""How far the valid rates of blocks lie apart, and how far they would if only chance differed.

The spread of B block rates is the largest minus the smallest. Two kinds of chance move it:

- *nonces*: a rate p of n nonces has the standard error √(p(1 − p)/n);
- *heads*: a block draws its random head W and its target t anew, and its distances are wider or
  narrower for it. The rate moves with it (:class:`assay.stats.BlockLaw`), more nonces do not reduce
  this part, and at a rate of one half it vanishes. How much depends on the *effective dimension* of
  the states in front of the head: the hidden size where they are random directions, and less where
  they lie along a few axes.

A spread beyond the band of random directions is structure of the states; one beyond the band of
their own effective dimension is structure that the randomisation left.

Legend of shapes: B blocks.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats as distributions

from assay import stats
from assay.errors import UsageError
from assay.stats.chord import RANDOM_HEAD_ROWS, rate_standard_error

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Valid rates of blocks and what chance makes of them.

    Args:
        rates: Valid rate per block, [B].
        value: Largest minus smallest rate.
        low, high: Ends of the band that has 95 % of the spreads where only chance differs.
        nonces_high: Upper end of the band of the nonces alone, without the random heads.
        p_value: Probability of such a spread or a larger one by chance.
    """

    rates: tuple[float, ...]
    value: float
    low: float
    high: float
    nonces_high: float
    p_value: float

    @property
    def inside(self) -> bool:
        """Whether the spread is not larger than chance makes it."""
        return self.value <= self.high


def spread_of(
    valid: Sequence[int], checked: Sequence[int], *, width: float | None = None
) -> Spread:
    """Return the spread of block rates with its noise band.

    Args:
        valid: Number of valid nonces per block, [B].
        checked: Number of nonces per block, [B].
        width: Dimension D, or effective dimension, of states that go through a random head drawn
            per block; None for states that do not.

    Raises:
        UsageError: There are fewer than 2 blocks, or a block without nonces.
    """
    if len(valid) != len(checked) or len(checked) < 2 or min(checked) < 1:
        raise UsageError(
            f"blocks of {list(checked)} nonces",
            wanted="at least 2 blocks with nonces",
            do="measure more",
        )
    rates = tuple(v / n for v, n in zip(valid, checked, strict=True))
    common = sum(valid) / sum(checked)
    n = distributions.hmean(checked)
    if not 0 < common < 1:  # nothing varies, so every spread but zero is beyond chance
        return Spread(rates, max(rates) - min(rates), 0.0, 0.0, 0.0, 1.0)
    nonce_error = rate_standard_error(common, round(n))
    # The range of normals with a known standard deviation: a studentized one with infinitely many
    # degrees of freedom.
    ends = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
    low, high = (
        nonce_error * float(distributions.studentized_range.ppf(q, len(rates), math.inf))
        for q in ends
    )
    law = stats.BlockLaw(dimension=RANDOM_HEAD_ROWS, freedom=width or math.inf)
    error = math.hypot(nonce_error, law.rate_error(stats.r_target_for(common, law.dimension)))
    value = max(rates) - min(rates)
    factor = error / nonce_error
    p_value = float(distributions.studentized_range.sf(value / error, len(rates), np.inf))
    return Spread(rates, value, low * factor, high * factor, high, p_value)


def first_reached(counts: Iterable[int], curve: Iterable[float], share: float) -> int | None:
    """Return the first of some counts at which a curve reaches a share; None for never."""
    return next((count for count, value in zip(counts, curve, strict=True) if value >= share), None)
