"""Noise laws: the density f_1 of an honest residual, and f_m of the same noise m times larger.

Both laws here have monotone likelihood ratios: f_m(x)/f_1(x) never falls as the residual x grows.
So a smaller residual never counts against a node, and noise smaller than calibrated makes the test
more cautious (docs/statistics.md).

In a fit, shapes are fixed and sizes are quantiles, because a test does not rely on the tail of a
law: honest residuals price its bets (:mod:`assay.stats.fair_bets`).

Suffixes: N values, C scales, H and J scales of a machine.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Self

import numpy as np
import numpy.typing as npt
import scipy
from pydantic import ConfigDict, Field

from assay.errors import UsageError
from assay.stats.chord import RANDOM_HEAD_ROWS, FloatArray, chord_mean, chord_std

RESOLUTION = 2.0**-23
"""Spacing of float32 numbers around √2: distances agree no better, unless they are equal."""

GROSS_PROBABILITY = 1e-4
"""Largest probability with which honest noise exceeds a residual that is counted as gross."""

JUNK_SIGMA = chord_std(RANDOM_HEAD_ROWS)
"""Residual of the best invented distance for `poc-2.0`, the constant √2 (0.0078).

A distance drawn from the chord law misses by √2 times as much (0.011) and is easier to catch.
"""

LARGEST_LOG = 500.0
"""Largest logarithm of a ratio of densities: its exponential does not overflow."""

REACH = 4.5
"""Spreads to either side over which a test averages the scale of a machine."""

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

_LARGEST = 2.0  # difference of two distances, and of two unit vectors
# Deviations of ln scale for the likelihoods of cheats.
_COARSE = np.linspace(-3.0, 3.0, 7)
# Largest step of ln scale for the likelihoods of honest machines.
_CLOSEST = 0.0125


class StrictLaw:
    """A law that pydantic reads from a file strictly: numbers of its fields, and nothing else.

    Beyond the ranges of the fields, densities overflow float64.
    """

    __slots__ = ()
    __pydantic_config__: ClassVar = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def require(condition: bool, seen: str, wanted: str) -> None:
    """Refuse a parameter of a law with a UsageError, unless the condition holds."""
    if not condition:
        raise UsageError(
            seen, wanted=wanted, do="check the calibration that this noise law comes from"
        )


def _clipped_size(values: npt.ArrayLike) -> FloatArray:
    size_N = np.abs(np.asarray(values, dtype=np.float64)).ravel()
    # fmin of NaN and a number is the number, so NaN and infinity become the largest residual.
    return np.fmin(size_N, _LARGEST)


@dataclass(frozen=True, slots=True)
class ScaleNoise(StrictLaw):
    """The law of residuals e = received − recomputed of a distance: e ~ sigma · t.

    Args:
        sigma: Scale of honest noise, in units of the distance; at least `RESOLUTION`.
        dof: Degrees of freedom of Student's t; smaller means heavier tails.
        junk_sigma: Standard deviation of the residual of an invented value, by default
            `JUNK_SIGMA`.

    Raises:
        UsageError: A parameter is not finite or out of range.
    """

    sigma: Annotated[float, Field(le=1e3)]
    dof: Annotated[float, Field(ge=0.1, le=1e6)] = 6.0
    junk_sigma: Annotated[float, Field(ge=1e-9, le=1e3)] = JUNK_SIGMA

    def __post_init__(self) -> None:
        positive = "a positive finite number"
        require(
            RESOLUTION <= self.sigma < math.inf,
            f"sigma {self.sigma}",
            f"at least {RESOLUTION:.3g}, finite",
        )
        require(0 < self.dof < math.inf, f"{self.dof} degrees of freedom", positive)
        require(0 < self.junk_sigma < math.inf, f"junk_sigma {self.junk_sigma}", positive)

    @property
    def size(self) -> float:
        """A typical honest residual: ``sigma``."""
        return self.sigma

    def scaled(self, factor: float) -> Self:
        """Return the law of noise ``factor`` times larger."""
        # Smaller noise than the spacing of float32 would make every rounding an accusation.
        return replace(self, sigma=max(self.sigma * factor, RESOLUTION))

    @property
    def junk_multiple(self) -> float:
        """``junk_sigma`` in units of ``sigma``."""
        return self.junk_sigma / self.sigma

    @property
    def gross_threshold(self) -> float:
        """The absolute residual that honest noise exceeds with probability `GROSS_PROBABILITY`."""
        return self.sigma * float(scipy.stats.t.isf(GROSS_PROBABILITY / 2, self.dof))

    def magnitudes(self, values: npt.ArrayLike) -> FloatArray:
        """Return |e|, at most 2, [N]; non-finite residuals become 2."""
        return _clipped_size(values)

    def log_density(self, magnitudes: FloatArray, multiples: float | FloatArray) -> FloatArray:
        """Return the log density of multiple · sigma · t at the given |e|, broadcast."""
        scales = np.multiply(multiples, self.sigma)
        half = (self.dof + 1) / 2
        log_gammas = scipy.special.gammaln(half) - scipy.special.gammaln(self.dof / 2)
        constant = log_gammas - math.log(self.dof * math.pi) / 2
        z = magnitudes / scales
        return np.asarray(constant - np.log(scales) - half * np.log1p(z * z / self.dof))

    def survival(self, magnitudes_N: FloatArray) -> FloatArray:
        """Return P(|sigma · t| ≥ |e|), [N]."""
        survival_N = 2 * scipy.stats.t.sf(magnitudes_N / self.sigma, self.dof)
        return np.asarray(survival_N, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class LogNoise(StrictLaw):
    """The law of L2 distances of vectors: ln L2 is normal up to ``tail`` sd, exponential beyond.

    With x = ln max(L2, floor), the density is exp(−ρ(z))/c with z = (x − mu)/sd and Huber's ρ. It
    is log-concave, which makes the ratio monotone. Its tail is a power law in L2, as measured noise
    has it (routing flips, ties). Noise m times larger is the same density shifted by ln m.

    Args:
        mu: Location of x for honest noise, in ln L2.
        sd: Scale of x.
        dimension: Length of the vectors; an invented unit vector lies a chord-law distance away.
        tail: Start of the exponential tail, in units of sd.
        floor: Distance below which values are not told apart (the rounding of fp16 vectors).

    Raises:
        UsageError: A parameter is not finite or out of range.
    """

    mu: Annotated[float, Field(ge=-100, le=10)]
    sd: Annotated[float, Field(ge=1e-4, le=100)]
    dimension: Annotated[int, Field(le=2**24)] = 12
    tail: Annotated[float, Field(ge=1e-3, le=30)] = 2.0
    floor: Annotated[float, Field(ge=1e-12)] = 1e-4

    def __post_init__(self) -> None:
        require(math.isfinite(self.mu), f"mu {self.mu}", "a finite number")
        require(0 < self.sd < math.inf, f"sd {self.sd}", "a positive finite number")
        require(self.dimension >= 2, f"dimension {self.dimension}", "at least 2")
        require(0 < self.tail < math.inf, f"tail {self.tail}", "a positive finite number")
        require(0 < self.floor < _LARGEST, f"floor {self.floor}", "a distance in (0, 2)")

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
        return chord_mean(self.dimension) / self.size

    @property
    def gross_threshold(self) -> float:
        """The L2 distance that honest noise exceeds with probability `GROSS_PROBABILITY`."""
        log = self.mu + self.sd * self.standard_quantile(GROSS_PROBABILITY)
        return math.exp(min(log, LARGEST_LOG))

    @property
    def standard_mass(self) -> float:
        """∫ exp(−ρ(z)) dz: the normal core and the two exponential tails."""
        core = math.sqrt(2 * math.pi) * math.erf(self.tail / math.sqrt(2))
        return core + 2 * math.exp(-(self.tail**2) / 2) / self.tail

    def standard_quantile(self, probability: float) -> float:
        """Return the z that the standardised law exceeds with ``probability``, at most ½."""
        beyond = math.exp(-(self.tail**2) / 2) / self.tail / self.standard_mass
        if probability < beyond:
            return self.tail + math.log(beyond / probability) / self.tail
        below = 0.5 + (0.5 - probability) * self.standard_mass / math.sqrt(2 * math.pi)
        return float(scipy.special.ndtri(below))

    def magnitudes(self, values: npt.ArrayLike) -> FloatArray:
        """Return the distances clipped to floor and 2, [N]; a negative one is a UsageError.

        Non-finite distances become 2.
        """
        values_N = np.asarray(values, dtype=np.float64)
        negative = values_N[np.isfinite(values_N) & (values_N < 0)]
        if negative.size:
            raise UsageError(
                f"distance {negative[0]}",
                wanted="L2 distances, at least 0",
                do="pass norms, not residuals",
            )
        return np.maximum(_clipped_size(values_N), self.floor)

    def log_density(self, magnitudes: FloatArray, multiples: float | FloatArray) -> FloatArray:
        """Return the log density of ln L2 for distances as many times larger, broadcast."""
        return self._log_density(np.log(magnitudes), np.log(multiples))

    def log_likelihoods(self, distances: npt.ArrayLike, logs_C: FloatArray) -> FloatArray:
        """Return the log density of distances [N] under noise exp(logs) times larger, [N, C]."""
        return self._log_density(np.log(self.magnitudes(distances))[:, None], logs_C)

    def _log_density(self, logs: FloatArray, shifts: FloatArray) -> FloatArray:
        z = np.abs(logs - self.mu - shifts) / self.sd
        rho = np.asarray(scipy.special.huber(self.tail, z), np.float64)
        return -rho - math.log(self.sd * self.standard_mass)

    def survival(self, magnitudes_N: FloatArray) -> FloatArray:
        """Return P(honest distance ≥ L2), [N]."""
        z_N = (np.log(magnitudes_N) - self.mu) / self.sd
        size_N = np.abs(z_N)
        core_N = math.sqrt(2 * math.pi) * (0.5 - scipy.special.ndtr(np.minimum(size_N, self.tail)))
        beyond_N = np.maximum(size_N - self.tail, 0)
        tail_N = -np.exp(-(self.tail**2) / 2) * np.expm1(-self.tail * beyond_N) / self.tail
        upper_N = 0.5 + (core_N - tail_N) / self.standard_mass
        return np.asarray(np.where(z_N >= 0, upper_N, 1 - upper_N), dtype=np.float64)


NoiseLaw = ScaleNoise | LogNoise
"""The laws of the residuals that `SequentialTest` takes."""


@dataclass(frozen=True, slots=True)
class Spread(StrictLaw):
    """The law of the scale of one machine relative to a noise law: ln scale ~ sd · t.

    A test that takes the scale as known accuses honest machines that are a little noisier than
    those measured.

    Args:
        sd: Scale of the logarithm; 0 where the scale is known.
        dof: Degrees of freedom of Student's t: few where ``sd`` itself is hardly known.

    Raises:
        UsageError: A parameter is out of range.
    """

    sd: float = 0.0
    dof: float = 30.0

    def __post_init__(self) -> None:
        require(
            0 <= self.sd < 1.0,
            f"a spread of {self.sd}",
            "0 to 1: beyond that nothing is known of a new machine",
        )
        require(
            1 <= self.dof <= 1e6, f"{self.dof} degrees of freedom", "a number from 1 to a million"
        )

    @property
    def atoms(self) -> tuple[FloatArray, FloatArray]:
        """A few multiples of the scale and their probabilities, [J] each, for cheats."""
        return self._grid(_COARSE)

    @property
    def fine(self) -> tuple[FloatArray, FloatArray]:
        """Close multiples of the scale and their probabilities, [H] each, for honest machines.

        No number of nonces distinguishes neighbours. Between scales too far apart, a cheat in a
        small share explains an honest machine better than either scale. With :attr:`atoms`, a sixth
        of all honest nodes were accused over 58 400 nonces; with these, none.
        """
        points = 2 * math.ceil(REACH * max(4, self.sd / _CLOSEST)) + 1
        return self._grid(np.linspace(-REACH, REACH, points))

    def _grid(self, deviations_J: FloatArray) -> tuple[FloatArray, FloatArray]:
        if self.sd == 0:
            return np.ones(1), np.ones(1)
        weight_J = scipy.stats.t.pdf(deviations_J, self.dof)
        probability_J = np.asarray(weight_J / weight_J.sum(), dtype=np.float64)
        return np.exp(self.sd * deviations_J), probability_J


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
