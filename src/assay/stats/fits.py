"""The fit of noise laws to honest residuals: the data choose the tail, and the law reaches the quantiles of the sample.

Suffixes: N values.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

from assay.errors import UsageError
from assay.stats.chord import FloatArray
from assay.stats.noise import RESOLUTION, LogNoise, NoiseLaw, ScaleNoise

FEWEST_RESIDUALS = 16
"""Fewest honest residuals that a law is fitted to."""

CONFIDENCE = 0.99
"""One-sided confidence of an upper law."""

SMALLEST_LOG_SD = 0.1  # least spread of ln L2 that is believed: 10 % of the distance

DOFS = (2.0, 2.5, 3.0, 4.0, 6.0)
"""Degrees of freedom among which the residuals of distances choose, the heaviest tail first."""

TAILS = (0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
"""Starts of the exponential tail of ln L2 among which vectors choose, the heaviest first; 3 is nearly log-normal."""

INDIFFERENT = 0.5
"""Loss of log-likelihood, a natural logarithm, up to which a wider law replaces the likeliest one.

A sample seldom tells two neighbouring tails or spreads apart, so the heaviest within this loss is taken. Tails of
distances lighter than with 6 degrees of freedom are not offered, because no small sample holds a nonce far out, such as
a routing flip.
"""

# A fitted law also reaches the quantiles of its sample, up to the quantile that three values lie beyond or the furthest
# one here. Chosen by what laws from 30 to 4096 nonces accuse (research/results/heavy_tails.json).
_QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.98)
_BEYOND = 3
_FURTHEST_SCALE, _FURTHEST_LOG = 0.985, 0.95
_ITERATIONS = 200

LawT = TypeVar("LawT", bound=NoiseLaw)


@dataclass(frozen=True, slots=True)
class NoiseFit(Generic[LawT]):
    """A noise law measured on honest residuals.

    A test needs either ``law``, which is at least as large as the true noise with `CONFIDENCE`, or ``reached`` with the
    ``error`` of its scale.

    Args:
        law: Upper law.
        reached: Law that reaches every trusted upper quantile of the sample, without a margin.
        estimate: Likeliest law of the family, to report.
        error: Standard error of the logarithm of the scale.
        n: Number of honest residuals that it rests on.
    """

    law: LawT
    reached: LawT
    estimate: LawT
    error: float
    n: int


def fit_scale_noise(
    residuals: npt.ArrayLike,
    *,
    dof: float | None = None,
) -> NoiseFit[ScaleNoise]:
    """Fit the scale of honest residuals of a distance, [N] finite values, by maximum likelihood under Student's t.

    The standard error comes from the Fisher information of ln sigma, 2·dof/(dof + 3) per residual (Lange, Little and
    Taylor 1989). Residuals that are all zero, as on identical hardware, give sigma = `RESOLUTION`.

    Args:
        residuals: Honest residuals.
        dof: Degrees of freedom; chosen among `DOFS` by the data when None.

    Raises:
        UsageError: There are too few residuals, one of them is not finite, or a parameter is out of range.
    """
    size_N = np.abs(_read_honest(residuals))
    candidates = [ScaleNoise(1.0, nu) for nu in (DOFS if dof is None else (dof,))]
    fitted = [law.scaled(max(_student_scale(size_N, law.dof), RESOLUTION)) for law in candidates]
    estimate = _heaviest_likely(fitted, size_N)
    nu = estimate.dof
    widest = _largest_quantile_ratio(size_N, lambda q: float(stats.t.isf((1 - q) / 2, nu)), _FURTHEST_SCALE)
    reached = ScaleNoise(max(estimate.sigma, widest), nu)
    error = math.sqrt((nu + 3) / (2 * nu * size_N.size))
    law = reached.scaled(math.exp(float(special.ndtri(CONFIDENCE)) * error))
    return NoiseFit(law, reached, estimate, error, size_N.size)


def fit_log_noise(
    distances: npt.ArrayLike,
    *,
    dimension: int = 12,
    floor: float = 1e-4,
) -> NoiseFit[LogNoise]:
    """Fit location and scale of the logarithms of honest L2 distances, [N] finite values.

    The location is the median. Only large distances accuse, so the upper half alone gives spread and tail.
    Distances that are all below ``floor`` give mu = ln floor and the least spread believed.

    Args:
        distances: Honest L2 distances.
        dimension: Length of the vectors.
        floor: Distance below which values are not told apart.

    Raises:
        UsageError: There are too few distances, one is negative or not finite, or a parameter is out of range.
    """
    values_N = _read_honest(distances)
    size_N = LogNoise(0.0, 1.0, dimension, 2.0, floor).magnitudes(values_N)
    mu = float(np.median(np.log(size_N)))
    upper_N = np.log(size_N) - mu
    upper_N = upper_N[upper_N > 0]
    fitted = [LogNoise(mu, _upper_sd(upper_N, start), dimension, start, floor) for start in TAILS]
    estimate = _heaviest_likely(fitted, np.exp(mu + upper_N))
    widest = _largest_quantile_ratio(np.log(size_N) - mu, lambda q: estimate.standard_quantile(1 - q), _FURTHEST_LOG)
    reached = LogNoise(mu, max(estimate.sd, widest), dimension, estimate.tail, floor)
    # The median has standard error 1/(2·f(0)·√n), the scale √(1/2n).
    z, root = float(special.ndtri(CONFIDENCE)), math.sqrt(size_N.size)
    error = reached.sd * reached.standard_mass / (2 * root)
    upper_sd = reached.sd * math.exp(z / (math.sqrt(2) * root))
    law = LogNoise(mu + z * error, upper_sd, dimension, estimate.tail, floor)
    return NoiseFit(law, reached, estimate, error, size_N.size)


def _read_honest(values: npt.ArrayLike) -> FloatArray:
    values_N = np.asarray(values, dtype=np.float64).ravel()
    if values_N.size < FEWEST_RESIDUALS or not np.isfinite(values_N).all():
        raise UsageError(
            f"{values_N.size} residuals, {np.count_nonzero(~np.isfinite(values_N))} of them not finite",
            wanted=f"at least {FEWEST_RESIDUALS} finite residuals of honest nonces",
            do="measure more nonces, and find out why any are not finite",
        )
    return values_N


def _heaviest_likely(fitted: list[LawT], size_N: FloatArray) -> LawT:
    """Return the first law whose log-likelihood is within `INDIFFERENT` of the best; the heaviest tail stands first."""
    likelihoods = [float(law.log_density(size_N, 1.0).sum()) if size_N.size else 0.0 for law in fitted]
    return next(law for law, found in zip(fitted, likelihoods, strict=True) if found >= max(likelihoods) - INDIFFERENT)


def _upper_sd(upper_N: FloatArray, tail: float) -> float:
    """Return the likeliest sd of the values above the median, given where their exponential tail begins."""
    if not upper_N.size or upper_N.max() <= SMALLEST_LOG_SD:
        return SMALLEST_LOG_SD

    def loss(log_sd: float) -> float:
        z_N = upper_N / math.exp(log_sd)
        return float(special.huber(tail, z_N).sum()) + upper_N.size * log_sd

    bounds = (math.log(SMALLEST_LOG_SD), math.log(max(float(upper_N.max()), 2 * SMALLEST_LOG_SD)))
    return math.exp(float(optimize.minimize_scalar(loss, bounds=bounds, method="bounded").x))


def _student_scale(size_N: FloatArray, dof: float) -> float:
    """Return the likeliest scale of a centred t, by its EM fixed point: σ² = mean((ν + 1)·e²/(ν + e²/σ²))."""
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
    """Return the scale at which the law reaches every trusted upper quantile of the sample."""
    furthest = min(1 - _BEYOND / sample_N.size, furthest)
    trusted = [q for q in _QUANTILES if q < furthest] + [furthest]
    reached = [(float(np.quantile(sample_N, q)), law_quantile(q)) for q in trusted]
    return max(seen / expected for seen, expected in reached if expected > 0)
