"""Noise laws from measured honest residuals.

The law that a test uses must be at least as large as the true noise. So a fit returns two laws: the best estimate,
and an upper one, which reaches every trusted upper quantile of the sample and adds a confidence margin.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from assay.errors import UsageError
from assay.stats._noise import JUNK_SIGMA, RESOLUTION, LogNoise, NoiseLaw, ScaleNoise

FloatArray = npt.NDArray[np.float64]
LawT = TypeVar("LawT", bound=NoiseLaw)

SMALLEST_SAMPLE = 16
"""Fewest honest residuals that a law is fitted to."""

SMALLEST_LOG_SD = 0.1
"""Least spread of ln L2 that is believed: 10 % of the distance."""

_QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.98)
# Measured tails are heavier than those of the laws, and only far quantiles tell, so three values beyond one must do.
# But a law that reached the largest of thousands would see little, so there is a furthest one. Both were chosen by
# what laws from 30 to 4096 nonces accuse (benchmarks/heavy_tails.py).
_BEYOND = 3
_FURTHEST_SCALE, _FURTHEST_LOG = 0.985, 0.95
_ITERATIONS = 200


@dataclass(frozen=True, slots=True)
class NoiseFit(Generic[LawT]):
    """A noise law measured on honest residuals.

    Attributes:
        law: the upper law, to test with.
        estimate: the best estimate, to report.
        n: honest residuals it rests on.
        confidence: one-sided confidence that the law is not smaller than the noise.
        tail_p: probability, under ``law``, of a maximum as large as the one seen. Below 1 % the tail is
            heavier than the law says: refit with fewer degrees of freedom, or an earlier tail.
    """

    law: LawT
    estimate: LawT
    n: int
    confidence: float
    tail_p: float


def fit_scale_noise(
    residuals: npt.ArrayLike, *, dof: float = 6.0, confidence: float = 0.99, junk_sigma: float = JUNK_SIGMA
) -> NoiseFit[ScaleNoise]:
    """Scale of honest residuals of a distance, by maximum likelihood under Student's t, [N] finite values.

    The upper law also reaches the quantiles of the sample, up to 0.985 or to that which three values lie beyond.
    The margin uses the Fisher information of ln sigma, 2·dof/(dof + 3) per residual (Lange, Little and Taylor 1989).
    Residuals that are all zero, as on identical hardware, give sigma = `RESOLUTION`.

    Raises:
        UsageError: fewer than `SMALLEST_SAMPLE` residuals, a non-finite one, or a parameter out of range.
    """
    size_N = np.abs(_honest(residuals, confidence))
    ScaleNoise(1.0, dof, junk_sigma)  # refuses bad parameters before they reach the formulas
    sigma = max(_student_scale(size_N, dof), RESOLUTION)
    widest = _largest_quantile_ratio(size_N, lambda q: float(stats.t.isf((1 - q) / 2, dof)), _FURTHEST_SCALE)
    margin = float(special.ndtri(confidence)) * math.sqrt((dof + 3) / (2 * dof * size_N.size))
    law = ScaleNoise(max(sigma, widest) * math.exp(margin), dof, junk_sigma)
    estimate = ScaleNoise(sigma, dof, junk_sigma)
    return NoiseFit(law, estimate, size_N.size, confidence, _tail_p(law, size_N))


def fit_log_noise(
    distances: npt.ArrayLike,
    *,
    dimension: int = 12,
    tail: float = 2.0,
    floor: float = 1e-4,
    confidence: float = 0.99,
) -> NoiseFit[LogNoise]:
    """Location and scale of the logarithms of honest L2 distances, [N] finite values, from median and upper quantiles.

    Only the upper half matters for accusations, so only it is fitted: to its quantiles up to 0.95 or to that which
    three values lie beyond. Distances that are all below ``floor`` give mu = ln floor and the least spread believed.

    Raises:
        UsageError: fewer than `SMALLEST_SAMPLE` distances, a non-finite or negative one, or a parameter out of range.
    """
    values_N = _honest(distances, confidence)
    unit = LogNoise(0.0, 1.0, dimension, tail, floor)
    x_N = np.log(unit.magnitudes(values_N))
    mu = float(np.median(x_N))
    widest = _largest_quantile_ratio(x_N - mu, lambda q: unit.standard_quantile(1 - q), _FURTHEST_LOG)
    sd = max(widest, SMALLEST_LOG_SD)
    z, root = float(special.ndtri(confidence)), math.sqrt(x_N.size)
    mu_upper = mu + z * sd * unit.standard_mass / (2 * root)  # the median has standard error 1/(2·f(0)·√n)
    law = LogNoise(mu_upper, sd * math.exp(z / (math.sqrt(2) * root)), dimension, tail, floor)
    estimate = LogNoise(mu, sd, dimension, tail, floor)
    return NoiseFit(law, estimate, x_N.size, confidence, _tail_p(law, np.exp(x_N)))


def _honest(values: npt.ArrayLike, confidence: float) -> FloatArray:
    values_N = np.asarray(values, dtype=np.float64).ravel()
    if values_N.size < SMALLEST_SAMPLE or not np.isfinite(values_N).all():
        raise UsageError(
            f"{values_N.size} residuals, {np.count_nonzero(~np.isfinite(values_N))} of them not finite",
            wanted=f"at least {SMALLEST_SAMPLE} finite residuals of honest nonces",
            do="measure more nonces, and find out why any are not finite",
        )
    if not 0.5 <= confidence < 1.0:
        raise UsageError(f"confidence {confidence}", wanted="a number in [0.5, 1)", do="use 0.99")
    return values_N


def _student_scale(size_N: FloatArray, dof: float) -> float:
    """Maximum-likelihood scale of a centred t, by its EM fixed point: σ² = mean((ν + 1)·e²/(ν + e²/σ²))."""
    square_N = size_N**2
    variance = float(square_N.mean())
    for _ in range(_ITERATIONS):
        if variance < RESOLUTION**2:
            break
        variance, before = float(np.mean((dof + 1) * square_N / (dof + square_N / variance))), variance
        if abs(variance - before) <= 1e-10 * before:
            break
    return math.sqrt(variance)


def _largest_quantile_ratio(sample_N: FloatArray, law_quantile: Callable[[float], float], furthest: float) -> float:
    """Least scale at which the law reaches the upper quantiles of the sample, to the furthest that is trusted."""
    furthest = min(1 - _BEYOND / sample_N.size, furthest)
    trusted = [q for q in _QUANTILES if q < furthest] + [furthest]
    reached = [(float(np.quantile(sample_N, q)), law_quantile(q)) for q in trusted]
    return max(seen / expected for seen, expected in reached if expected > 0)


def _tail_p(law: NoiseLaw, magnitudes_N: FloatArray) -> float:
    beyond = float(law.survival(magnitudes_N.max(keepdims=True))[0])
    return -math.expm1(magnitudes_N.size * math.log1p(-beyond)) if beyond < 1 else 1.0
