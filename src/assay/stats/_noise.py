"""Noise laws and their fit: what honest recomputation looks like, and what the same values look like otherwise.

A law describes a residual by its honest density f₁ and a family f_m, the same noise m times larger. Both laws here have
monotone likelihood ratios: f_m(x)/f₁(x) never falls as the residual grows. So a value closer to the recomputed one
never counts against a node, and noise smaller than calibrated only makes the test more cautious (docs/statistics.md).

Suffixes: N values.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from assay.errors import UsageError
from assay.stats._chord import RANDOM_HEAD_ROWS, FloatArray, chord_cdf, chord_mean, chord_std

RESOLUTION = 2.0**-23
"""Spacing of fp32 numbers around √2: two distances cannot agree better than this, unless they are equal."""

GROSS_PROBABILITY = 1e-4
"""A residual that honest noise exceeds with this probability at most is counted as gross."""

JUNK_SIGMA = chord_std(RANDOM_HEAD_ROWS)
"""Residual of the best invented distance for ``poc-2.0``, the constant √2 (0.0078).

A distance drawn from the chord law misses by √2 times as much (0.011) and is easier to catch.
"""

_LARGEST = 2.0  # largest difference of two distances, and of two unit vectors
SMALLEST_SAMPLE = 16  # fewest honest residuals that a law is fitted to
SMALLEST_LOG_SD = 0.1  # least spread of ln L2 that is believed: 10 % of the distance
_QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.98)
# Measured tails are heavier than those of the laws, and only far quantiles tell, so three values beyond one must do.
# But a law that reached the largest of thousands would see little, so there is a furthest one. Both were chosen by
# what laws from 30 to 4096 nonces accuse (benchmarks/heavy_tails.py).
_BEYOND = 3
_FURTHEST_SCALE, _FURTHEST_LOG = 0.985, 0.95
_ITERATIONS = 200


def _require(condition: bool, seen: str, wanted: str) -> None:
    if not condition:
        raise UsageError(seen, wanted=wanted, do="check the calibration that this noise law comes from")


def _clipped_size(values: npt.ArrayLike) -> FloatArray:
    size_N = np.abs(np.asarray(values, dtype=np.float64)).ravel()
    # fmin takes the number when the other side is NaN, so NaN and infinity both become the largest residual.
    return np.fmin(size_N, _LARGEST)


@dataclass(frozen=True, slots=True)
class ScaleNoise:
    """Residuals e = received − recomputed of a distance: e ~ sigma · t with ``dof`` degrees of freedom.

    Args:
        sigma: Scale of honest noise, in units of the distance; at least `RESOLUTION`.
        dof: Degrees of freedom of Student's t; smaller means heavier tails.
        junk_sigma: Standard deviation of the residual of an invented value, by default `JUNK_SIGMA`.

    Raises:
        UsageError: A parameter is not finite or out of range.
    """

    sigma: float
    dof: float = 6.0
    junk_sigma: float = JUNK_SIGMA

    def __post_init__(self) -> None:
        _require(RESOLUTION <= self.sigma < math.inf, f"sigma {self.sigma}", f"at least {RESOLUTION:.3g}, finite")
        _require(0 < self.dof < math.inf, f"{self.dof} degrees of freedom", "a positive finite number")
        _require(0 < self.junk_sigma < math.inf, f"junk_sigma {self.junk_sigma}", "a positive finite number")

    @property
    def junk_multiple(self) -> float:
        """``junk_sigma`` in units of ``sigma``."""
        return self.junk_sigma / self.sigma

    @property
    def gross_threshold(self) -> float:
        """The absolute residual that honest noise exceeds with probability `GROSS_PROBABILITY`."""
        return self.sigma * float(stats.t.isf(GROSS_PROBABILITY / 2, self.dof))

    @property
    def junk_detection(self) -> float:
        """P(|N(0, junk_sigma²)| > gross threshold)."""
        return float(special.erfc(self.gross_threshold / self.junk_sigma / math.sqrt(2)))

    def magnitudes(self, values: npt.ArrayLike) -> FloatArray:
        """Return |e|, at most 2, [N]; non-finite residuals become 2."""
        return _clipped_size(values)

    def log_density(self, magnitudes_N: FloatArray, multiple: float) -> FloatArray:
        """Return the logarithm of the density of multiple · sigma · t at the given |e|, [N]."""
        scale, half = multiple * self.sigma, (self.dof + 1) / 2
        constant = special.gammaln(half) - special.gammaln(self.dof / 2) - math.log(self.dof * math.pi) / 2
        z_N = magnitudes_N / scale
        return np.asarray(constant - math.log(scale) - half * np.log1p(z_N * z_N / self.dof), dtype=np.float64)

    def survival(self, magnitudes_N: FloatArray) -> FloatArray:
        """Return P(|sigma · t| ≥ |e|), [N]."""
        return np.asarray(2 * stats.t.sf(magnitudes_N / self.sigma, self.dof), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class LogNoise:
    """L2 distances of published vectors: x = ln max(L2, floor), normal up to ``tail`` sd and exponential beyond.

    The density is exp(−ρ(z))/c with z = (x − mu)/sd and Huber's ρ. It is log-concave, which makes the ratio monotone.
    Its tail is a power law in L2, as measured noise has it (routing flips, ties). Noise m times larger is the same
    density shifted by ln m.

    Args:
        mu: Location of x for honest noise, in ln L2.
        sd: Scale of x.
        dimension: Length of the vectors; an invented unit vector lies a chord-law distance away.
        tail: Start of the exponential tail, in units of sd.
        floor: Distance below which values are not told apart (the rounding of fp16 vectors).

    Raises:
        UsageError: A parameter is not finite or out of range.
    """

    mu: float
    sd: float
    dimension: int = 12
    tail: float = 2.0
    floor: float = 1e-4

    def __post_init__(self) -> None:
        _require(math.isfinite(self.mu), f"mu {self.mu}", "a finite number")
        _require(0 < self.sd < math.inf, f"sd {self.sd}", "a positive finite number")
        _require(self.dimension >= 2, f"dimension {self.dimension}", "at least 2")
        _require(0 < self.tail < math.inf, f"tail {self.tail}", "a positive finite number")
        _require(0 < self.floor < _LARGEST, f"floor {self.floor}", "a distance in (0, 2)")

    @property
    def junk_multiple(self) -> float:
        """The mean distance of an invented vector over the typical honest distance."""
        return chord_mean(self.dimension) / math.exp(self.mu)

    @property
    def gross_threshold(self) -> float:
        """The L2 distance that honest noise exceeds with probability `GROSS_PROBABILITY`."""
        return math.exp(self.mu + self.sd * self.standard_quantile(GROSS_PROBABILITY))

    @property
    def junk_detection(self) -> float:
        """The probability under the chord law of a distance above the gross threshold."""
        return 1 - float(chord_cdf(self.gross_threshold, self.dimension))

    @property
    def standard_mass(self) -> float:
        """∫ exp(−ρ(z)) dz: the normal core and the two exponential tails."""
        core = math.sqrt(2 * math.pi) * math.erf(self.tail / math.sqrt(2))
        return core + 2 * math.exp(-(self.tail**2) / 2) / self.tail

    def standard_quantile(self, probability: float) -> float:
        """Return the z that the standardised law exceeds with ``probability`` (at most one half)."""
        beyond = math.exp(-(self.tail**2) / 2) / self.tail / self.standard_mass
        if probability < beyond:
            return self.tail + math.log(beyond / probability) / self.tail
        return float(special.ndtri(0.5 + (0.5 - probability) * self.standard_mass / math.sqrt(2 * math.pi)))

    def magnitudes(self, values: npt.ArrayLike) -> FloatArray:
        """Return the distances between floor and 2, [N]; non-finite ones become 2.

        Raises:
            UsageError: A distance is negative.
        """
        values_N = np.asarray(values, dtype=np.float64)
        negative = values_N[np.isfinite(values_N) & (values_N < 0)]
        if negative.size:
            raise UsageError(
                f"distance {negative[0]}", wanted="L2 distances, at least 0", do="pass norms, not residuals"
            )
        return np.maximum(_clipped_size(values_N), self.floor)

    def log_density(self, magnitudes_N: FloatArray, multiple: float) -> FloatArray:
        """Return the logarithm of the density of x = ln L2 for distances ``multiple`` times larger, [N]."""
        z_N = np.abs(np.log(magnitudes_N) - self.mu - math.log(multiple)) / self.sd
        return -np.asarray(special.huber(self.tail, z_N), dtype=np.float64) - math.log(self.sd * self.standard_mass)

    def survival(self, magnitudes_N: FloatArray) -> FloatArray:
        """Return P(honest distance ≥ L2), [N]."""
        z_N = (np.log(magnitudes_N) - self.mu) / self.sd
        size_N = np.abs(z_N)
        core_N = math.sqrt(2 * math.pi) * (0.5 - special.ndtr(np.minimum(size_N, self.tail)))
        tail_N = -np.exp(-(self.tail**2) / 2) * np.expm1(-self.tail * np.maximum(size_N - self.tail, 0)) / self.tail
        upper_N = 0.5 + (core_N - tail_N) / self.standard_mass
        return np.asarray(np.where(z_N >= 0, upper_N, 1 - upper_N), dtype=np.float64)


NoiseLaw = ScaleNoise | LogNoise
"""The kinds of residual that `SequentialTest` can judge."""

LawT = TypeVar("LawT", bound=NoiseLaw)


@dataclass(frozen=True, slots=True)
class NoiseFit(Generic[LawT]):
    """A noise law measured on honest residuals.

    The law that a test uses must be at least as large as the true noise. So a fit returns two laws: the best estimate,
    and an upper one, which reaches every trusted upper quantile of the sample and adds a confidence margin.

    Args:
        law: Upper law, to test with.
        estimate: Best estimate, to report.
        n: Number of honest residuals that it rests on.
        confidence: One-sided confidence that the law is not smaller than the noise.
        tail_p: Probability, under ``law``, of a maximum as large as the one seen. Below 1 % the tail is
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
    """Fit the scale of honest residuals of a distance, [N] finite values, by maximum likelihood under Student's t.

    The upper law also reaches the quantiles of the sample, up to 0.985 or to that which three values lie beyond.
    The margin uses the Fisher information of ln sigma, 2·dof/(dof + 3) per residual (Lange, Little and Taylor 1989).
    Residuals that are all zero, as on identical hardware, give sigma = `RESOLUTION`.

    Raises:
        UsageError: There are too few residuals, one of them is not finite, or a parameter is out of range.
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
    """Fit location and scale of the logarithms of honest L2 distances, [N] finite values, to median and quantiles.

    Only the upper half matters for accusations, so only it is fitted: to its quantiles up to 0.95 or to that which
    three values lie beyond. Distances that are all below ``floor`` give mu = ln floor and the least spread believed.

    Raises:
        UsageError: There are too few distances, one is negative or not finite, or a parameter is out of range.
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
    """Return the least scale at which the law reaches the upper quantiles of the sample that are trusted."""
    furthest = min(1 - _BEYOND / sample_N.size, furthest)
    trusted = [q for q in _QUANTILES if q < furthest] + [furthest]
    reached = [(float(np.quantile(sample_N, q)), law_quantile(q)) for q in trusted]
    return max(seen / expected for seen, expected in reached if expected > 0)


def _tail_p(law: NoiseLaw, magnitudes_N: FloatArray) -> float:
    beyond = float(law.survival(magnitudes_N.max(keepdims=True))[0])
    return -math.expm1(magnitudes_N.size * math.log1p(-beyond)) if beyond < 1 else 1.0
