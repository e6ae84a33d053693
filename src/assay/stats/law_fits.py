"""Fits of noise laws to honest residuals.

Shapes are fixed and sizes are quantiles, because a test does not rely on the tail of a law: honest
residuals price its bets (:mod:`assay.stats.fair_bets`).
"""

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import scipy

from assay.errors import UsageError
from assay.stats.chord import FloatArray
from assay.stats.noise_laws import RESOLUTION, LogNoise, ScaleNoise

FEWEST_RESIDUALS = 16
"""Fewest honest residuals that a law is fitted to."""

SMALLEST_LOG_SD = 0.1
"""Smallest spread of ln L2 that is credible: 10 % of the distance."""

DOF = 4.0
"""Degrees of freedom of a measured law of distances."""

TAIL = 2.0
"""Start of the exponential tail of a measured law of vectors, in units of sd."""

UPPER = 0.9
"""Quantile of honest distances of vectors that gives sd, with the median.

It is an upper one, since only large distances accuse.
"""


def fit_scale_noise(residuals: npt.ArrayLike) -> tuple[ScaleNoise, float]:
    """Fit the scale of honest residuals of a distance, [N], by the median of their sizes.

    Residuals that are mostly zero, as on identical hardware, give sigma = `RESOLUTION`.

    Returns:
        The law, and the standard error of the logarithm of its scale.

    Raises:
        UsageError: There are too few residuals, or one is not finite.
    """
    size_N = np.abs(_read_honest(residuals))
    middle = float(scipy.stats.t.ppf(0.75, DOF))
    sigma = max(float(np.median(size_N)) / middle, RESOLUTION)
    # The standard error of the median m is 1/(2·f(m)·√n), and |t| has twice the density of t.
    error = 1 / (4 * float(scipy.stats.t.pdf(middle, DOF)) * middle * math.sqrt(size_N.size))
    return ScaleNoise(sigma, DOF), error


def fit_log_noise(
    distances: npt.ArrayLike, *, dimension: int = 12, floor: float = 1e-4, tail: float = TAIL
) -> tuple[LogNoise, float]:
    """Fit location and scale of the logarithms of honest L2 distances [N], by two quantiles.

    The other arguments are parameters of the law. Distances that are all below ``floor`` give mu =
    ln floor and the smallest credible spread.

    Returns:
        The law, and the standard error of its location.

    Raises:
        UsageError: There are too few distances, one is negative or not finite, or a parameter is
            out of range.
    """
    law = LogNoise(0.0, 1.0, dimension, tail, floor)
    middle, upper = np.quantile(np.log(law.magnitudes(_read_honest(distances))), [0.5, UPPER])
    sd = max(float(upper - middle) / law.standard_quantile(1 - UPPER), SMALLEST_LOG_SD)
    law = replace(law, mu=float(middle), sd=sd)
    # The standard error of the median is 1/(2·f(0)·√n).
    return law, sd * law.standard_mass / (2 * math.sqrt(np.size(distances)))


def _read_honest(values: npt.ArrayLike) -> FloatArray:
    values_N = np.asarray(values, dtype=np.float64).ravel()
    if values_N.size < FEWEST_RESIDUALS or not np.isfinite(values_N).all():
        broken = np.count_nonzero(~np.isfinite(values_N))
        raise UsageError(
            f"{values_N.size} residuals, {broken} of them not finite",
            wanted=f"at least {FEWEST_RESIDUALS} finite residuals of honest nonces",
            do="measure more nonces, and find out why any are not finite",
        )
    return values_N
