"""How far the valid rates of blocks lie apart, and how far they would if only chance differed.

The spread of B block rates is the largest minus the smallest. Two kinds of chance move it:

- *nonces*: a rate p of n nonces has the standard error √(p(1 − p)/n);
- *heads*: a block draws its random head W and its target t anew. The cosine of a random direction x of R^D with the
  target is that with u = Wᵀt, whose length varies: ‖u‖² ~ χ² with D degrees of freedom. So the standard deviation of a
  block's cosines varies by 1/√(2D) from block to block, and a rate p = Φ(z) moves with it by φ(z)·|z|. More nonces do
  not reduce this part; at a rate of one half it vanishes.

A spread beyond that band is structure. One cause has a measure: states that are not random directions but lie along a
few axes. With second moments M = E[x xᵀ] the cosines of a block have the variance uᵀMu, which varies by 1/√(2·D_eff),
D_eff = 1/‖M‖²: the *effective dimension*, D when all directions occur alike.

Legend of shapes: B blocks, N nonces, D hidden size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats as distributions

from assay import stats
from assay.errors import UsageError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Valid rates of blocks and what chance makes of them.

    Args:
        rates: Valid rate per block, [B].
        value: Largest minus smallest rate.
        low, high: Ends of the noise band; 95 % of spreads lie between them when only chance differs.
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

    @property
    def p_text(self) -> str:
        """Text of the p-value for a table; below 1e-6 the law of the range cannot be evaluated precisely enough."""
        return f"{self.p_value:.2g}" if self.p_value >= 1e-6 else "< 1e-6"


def spread_of(valid: Sequence[int], checked: Sequence[int], *, width: float | None = None) -> Spread:
    """Return the spread of block rates with its noise band.

    Args:
        valid: Number of valid nonces per block, [B].
        checked: Number of nonces per block, [B].
        width: Dimension D, or effective dimension, of states that go through a random head drawn per block;
            None for states that do not.

    Raises:
        UsageError: There are fewer than 2 blocks, or a block without nonces.
    """
    if len(valid) != len(checked) or len(checked) < 2 or min(checked) < 1:
        raise UsageError(f"blocks of {list(checked)} nonces", wanted="at least 2 blocks with nonces", do="measure more")
    rates = tuple(v / n for v, n in zip(valid, checked, strict=True))
    common = sum(valid) / sum(checked)
    n = distributions.hmean(checked)
    if not 0 < common < 1:  # nothing varies, so every spread but zero is beyond chance
        return Spread(rates, max(rates) - min(rates), 0.0, 0.0, 0.0, 1.0)
    low, high = stats.noise_band(common, round(n), len(rates), CONFIDENCE)
    nonce_error = stats.rate_standard_error(common, round(n))
    error = math.hypot(nonce_error, head_error(common, width) if width else 0.0)
    value, factor = max(rates) - min(rates), error / nonce_error
    p_value = float(distributions.studentized_range.sf(value / error, len(rates), np.inf))
    return Spread(rates, value, low * factor, high * factor, high, p_value)


def head_error(rate: float, width: float) -> float:
    """Return the standard deviation of a block's valid rate that its random head causes, φ(z)·|z|/√(2·width)."""
    z = float(distributions.norm.ppf(rate))
    return float(distributions.norm.pdf(z)) * abs(z) / math.sqrt(2 * width)


def effective_dimension(states_ND: npt.NDArray[np.floating]) -> float:
    """Return D_eff = 1/‖E[x xᵀ]‖² of unit states [N, D], from the mean squared product of two different ones.

    Raises:
        UsageError: There are fewer than 2 states.
    """
    if len(states_ND) < 2:
        raise UsageError(f"{len(states_ND)} states", wanted="at least 2", do="measure more nonces")
    unit_ND = states_ND.astype(np.float64)
    unit_ND /= np.linalg.norm(unit_ND, axis=1, keepdims=True)
    squares_NN = (unit_ND @ unit_ND.T) ** 2
    n = len(unit_ND)
    return float(n * (n - 1) / (squares_NN.sum() - np.trace(squares_NN)))
