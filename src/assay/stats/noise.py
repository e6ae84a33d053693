"""Noise laws: the density f_1 of an honest residual, the family f_m of the same noise m times larger, and their fit.

Both laws here have monotone likelihood ratios: f_m(x)/f_1(x) never falls as the residual x grows. So a smaller residual
never counts against a node, and noise smaller than calibrated makes the test more cautious (docs/statistics.md). In a
fit the data choose the tail.

Suffixes: N values.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict
from scipy import optimize, special, stats

from assay.errors import UsageError
from assay.stats.chord import RANDOM_HEAD_ROWS, FloatArray, chord_mean, chord_std

RESOLUTION = 2.0**-23
"""Spacing of fp32 numbers around √2: two distances cannot agree better than this, unless they are equal."""

GROSS_PROBABILITY = 1e-4
"""A residual that honest noise exceeds with this probability at most is counted as gross."""

JUNK_SIGMA = chord_std(RANDOM_HEAD_ROWS)
"""Residual of the best invented distance for ``poc-2.0``, the constant √2 (0.0078).

A distance drawn from the chord law misses by √2 times as much (0.011) and is easier to catch.
"""

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""How a law is read from a file: numbers of its fields, and nothing else."""

_LARGEST = 2.0  # largest difference of two distances, and of two unit vectors


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

    __pydantic_config__: ClassVar = STRICT

    sigma: float
    dof: float = 6.0
    junk_sigma: float = JUNK_SIGMA

    def __post_init__(self) -> None:
        _require(RESOLUTION <= self.sigma < math.inf, f"sigma {self.sigma}", f"at least {RESOLUTION:.3g}, finite")
        _require(0 < self.dof < math.inf, f"{self.dof} degrees of freedom", "a positive finite number")
        _require(0 < self.junk_sigma < math.inf, f"junk_sigma {self.junk_sigma}", "a positive finite number")

    @property
    def size(self) -> float:
        """A typical honest residual: ``sigma``."""
        return self.sigma

    def scaled(self, factor: float) -> Self:
        """Return the law of noise ``factor`` times larger."""
        return replace(self, sigma=max(self.sigma * factor, RESOLUTION))

    @property
    def junk_multiple(self) -> float:
        """``junk_sigma`` in units of ``sigma``."""
        return self.junk_sigma / self.sigma

    @property
    def gross_threshold(self) -> float:
        """The absolute residual that honest noise exceeds with probability `GROSS_PROBABILITY`."""
        return self.sigma * float(stats.t.isf(GROSS_PROBABILITY / 2, self.dof))

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

    __pydantic_config__: ClassVar = STRICT

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
    def size(self) -> float:
        """A typical honest residual: the median L2 distance."""
        return math.exp(self.mu)

    def scaled(self, factor: float) -> Self:
        """Return the law of noise ``factor`` times larger."""
        return replace(self, mu=self.mu + math.log(factor))

    @property
    def junk_multiple(self) -> float:
        """The mean distance of an invented vector over the typical honest distance."""
        return chord_mean(self.dimension) / math.exp(self.mu)

    @property
    def gross_threshold(self) -> float:
        """The L2 distance that honest noise exceeds with probability `GROSS_PROBABILITY`."""
        return math.exp(self.mu + self.sd * self.standard_quantile(GROSS_PROBABILITY))

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


@dataclass(frozen=True, slots=True)
class Spread:
    """The law of the scale of one machine over that of a noise law: ln scale ~ sd · t.

    A law is measured on some machines, and judges another. A test that takes the scale for known accuses honest
    machines that are a little noisier than those measured.

    Args:
        sd: Scale of the logarithm; 0 where the scale is known.
        dof: Degrees of freedom of Student's t: few where ``sd`` itself is hardly known.

    Raises:
        UsageError: A parameter is out of range.
    """

    __pydantic_config__: ClassVar = STRICT

    sd: float = 0.0
    dof: float = 30.0

    def __post_init__(self) -> None:
        _require(0 <= self.sd < 1.0, f"a spread of {self.sd}", "0 to 1: beyond that nothing is known of a new machine")
        _require(1 <= self.dof <= 1e6, f"{self.dof} degrees of freedom", "a number from 1 to a million")

    @property
    def atoms(self) -> tuple[FloatArray, FloatArray]:
        """A few multiples of the scale and their probabilities, [J] each, for the likelihoods of cheats."""
        return self._grid(_ATOMS)

    @property
    def fine(self) -> tuple[FloatArray, FloatArray]:
        """Multiples of the scale and their probabilities, [H] each, so close that no life tells neighbours apart.

        Between scales too far apart, a cheat in a small share explains an honest machine better than either scale.
        With :attr:`atoms`, a sixth of all honest nodes were accused over 58 400 nonces; with these, none.
        """
        points = 2 * math.ceil(REACH * max(4, self.sd / _CLOSE)) + 1
        return self._grid(np.linspace(-REACH, REACH, points))

    def _grid(self, deviations_J: FloatArray) -> tuple[FloatArray, FloatArray]:
        if self.sd == 0:
            return np.ones(1), np.ones(1)
        weight_J = stats.t.pdf(deviations_J, self.dof)
        return np.exp(self.sd * deviations_J), np.asarray(weight_J / weight_J.sum(), dtype=np.float64)


REACH = 4.5
"""Number of spreads to either side over which a test averages the scale of a machine."""

_ATOMS = np.linspace(-3.0, 3.0, 7)  # in spreads too
_CLOSE = 0.0125  # distance of ln scale


FEWEST_RESIDUALS = 16
"""Fewest honest residuals that a law is fitted to."""

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

_ITERATIONS = 200

LawT = TypeVar("LawT", bound=NoiseLaw)


@dataclass(frozen=True, slots=True)
class NoiseFit(Generic[LawT]):
    """A noise law measured on honest residuals.

    Args:
        law: Law.
        error: Standard error of the logarithm of the scale.
    """

    law: LawT
    error: float


def fit_scale_noise(residuals: npt.ArrayLike, *, dof: float | None = None) -> NoiseFit[ScaleNoise]:
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
    return NoiseFit(estimate, error=math.sqrt((estimate.dof + 3) / (2 * estimate.dof * size_N.size)))


def fit_log_noise(distances: npt.ArrayLike, *, dimension: int = 12, floor: float = 1e-4) -> NoiseFit[LogNoise]:
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
    # The standard error of the median is 1/(2·f(0)·√n).
    return NoiseFit(estimate, error=estimate.sd * estimate.standard_mass / (2 * math.sqrt(size_N.size)))


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
