"""Bets against honest noise that honest residuals price themselves: fair whatever the tail is.

Suffixes: N values, C caps, M multiples of the noise.
"""

import numpy as np
import numpy.typing as npt

from assay.stats.chord import FloatArray
from assay.stats.noise_laws import LARGEST_LOG, NoiseLaw

CAPS = np.exp(np.arange(0.5, 9.0, 0.5))
"""Largest likelihood ratios among which a bet chooses."""

# Share of cheap nonces for which the cap of a bet is chosen.
_CHEAP_SHARE = 0.1


def fair_bets(
    law: NoiseLaw, honest: npt.ArrayLike, multiples_M: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return caps and prices that make likelihood ratios fair bets under honest residuals [N].

    The ratio R = f_m/f_1 of noise m times larger is cut off at a cap c and divided by a price::

        price = max(1, (Σ_i min(R(x_i), c) + c) / (N + 1))

    docs/statistics.md says why that is fair (Vovk, "Conformal e-prediction", 2025). The cap is the
    one with which wealth grows fastest against a node that computes a tenth of its nonces m times
    as badly.

    Returns:
        The caps and the prices, [M] each.
    """
    size_N = law.magnitudes(honest)
    caps = []
    prices = []
    for multiple in multiples_M:
        honest_CN = _capped_ratios(law, size_N, multiple)
        cheap_CN = _capped_ratios(law, law.magnitudes(multiple * size_N), multiple)
        price_C = np.maximum(1.0, (honest_CN.sum(axis=1) + CAPS) / (size_N.size + 1))
        honest_growth_C = _growth(honest_CN / price_C[:, None])
        cheap_growth_C = _growth(cheap_CN / price_C[:, None])
        growth_C = (1 - _CHEAP_SHARE) * honest_growth_C + _CHEAP_SHARE * cheap_growth_C
        best = int(np.argmax(growth_C))
        caps.append(CAPS[best])
        prices.append(price_C[best])
    return np.array(caps), np.array(prices)


def _capped_ratios(law: NoiseLaw, size_N: FloatArray, multiple: float) -> FloatArray:
    """Return the ratios of noise ``multiple`` times larger, cut off at every cap, [C, N]."""
    log_ratio_N = law.log_density(size_N, multiple) - law.log_density(size_N, 1.0)
    ratio_N = np.exp(np.minimum(log_ratio_N, LARGEST_LOG))
    return np.asarray(np.minimum(ratio_N, CAPS[:, None]))


def _growth(bet_CN: FloatArray) -> FloatArray:
    """Return the mean growth of the logarithm of wealth by such bets, [C]."""
    return np.asarray(np.log1p(_CHEAP_SHARE * (bet_CN - 1)).mean(axis=1))
