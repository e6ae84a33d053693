"""Noise laws: the density f_1 of an honest residual, the family f_m of the same noise m times
larger, and their fit.

Both laws here have monotone likelihood ratios: f_m(x)/f_1(x) never falls as the residual x grows.
So a smaller residual never counts against a node, and noise smaller than calibrated makes the test
more cautious (docs/statistics.md).

Suffixes: N values.
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

RESOLUTION = (
    2.0**-23
)  # spacing of fp32 numbers around √2: distances agree no better than this, unless they are equal
GROSS_PROBABILITY = (
    1e-4  # a residual that honest noise exceeds with this probability at most is counted as gross
)
LARGEST_LOG = 500.0  # of ratios of densities, which must not overflow
_LARGEST = 2.0  # largest difference of two distances, and of two unit vectors

# Residual of the best invented distance for `poc-2.0`, the constant √2 (0.0078). A distance drawn
# from the chord law misses by √2 times as much (0.011) and is easier to catch.
JUNK_SIGMA = chord_std(RANDOM_HEAD_ROWS)


class Strict:
    """How a law is read from a file: numbers of its fields, and nothing else.

    Fields have ranges there, beyond which densities overflow float64 and no test is left.
    """

    __slots__ = ()
    __pydantic_config__: ClassVar = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def require(condition: bool, seen: str, wanted: str) -> None:
    """Refuse a parameter of a law with a UsageError."""
    if not condition:
        raise UsageError(
            seen, wanted=wanted, do="check the calibration that this noise law comes from"
        )


def _clipped_size(values: npt.ArrayLike) -> FloatArray:
    size_N = np.abs(np.asarray(values, dtype=np.float64)).ravel()
    # fmin takes the number when the other side is NaN, so NaN and infinity both become the largest
    # residual.
    return np.fmin(size_N, _LARGEST)


@dataclass(frozen=True, slots=True)
class ScaleNoise(Strict):
    """Residuals e = received − recomputed of a distance: e ~ sigma · t with ``dof`` degrees of
    freedom.

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
        require(
            RESOLUTION <= self.sigma < math.inf,
            f"sigma {self.sigma}",
            f"at least {RESOLUTION:.3g}, finite",
        )
        require(
            0 < self.dof < math.inf, f"{self.dof} degrees of freedom", "a positive finite number"
        )
        require(
            0 < self.junk_sigma < math.inf,
            f"junk_sigma {self.junk_sigma}",
            "a positive finite number",
        )

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
        return self.sigma * float(scipy.stats.t.isf(GROSS_PROBABILITY / 2, self.dof))

    def magnitudes(self, values: npt.ArrayLike) -> FloatArray:
        """Return |e|, at most 2, [N]; non-finite residuals become 2."""
        return _clipped_size(values)

    def log_density(self, magnitudes_N: FloatArray, multiple: float) -> FloatArray:
        """Return the logarithm of the density of multiple · sigma · t at the given |e|, [N]."""
        scale = multiple * self.sigma
        half = (self.dof + 1) / 2
        constant = (
            scipy.special.gammaln(half)
            - scipy.special.gammaln(self.dof / 2)
            - math.log(self.dof * math.pi) / 2
        )
        z_N = magnitudes_N / scale
        return np.asarray(
            constant - math.log(scale) - half * np.log1p(z_N * z_N / self.dof), dtype=np.float64
        )

    def survival(self, magnitudes_N: FloatArray) -> FloatArray:
        """Return P(|sigma · t| ≥ |e|), [N]."""
        return np.asarray(
            2 * scipy.stats.t.sf(magnitudes_N / self.sigma, self.dof), dtype=np.float64
        )


@dataclass(frozen=True, slots=True)
class LogNoise(Strict):
    """L2 distances of published vectors: x = ln max(L2, floor), normal up to ``tail`` sd and
    exponential beyond.

    The density is exp(−ρ(z))/c with z = (x − mu)/sd and Huber's ρ. It is log-concave, which makes
    the ratio monotone. Its tail is a power law in L2, as measured noise has it (routing flips,
    ties). Noise m times larger is the same density shifted by ln m.

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
        return math.exp(self.mu + self.sd * self.standard_quantile(GROSS_PROBABILITY))

    @property
    def standard_mass(self) -> float:
        """∫ exp(−ρ(z)) dz: the normal core and the two exponential tails."""
        core = math.sqrt(2 * math.pi) * math.erf(self.tail / math.sqrt(2))
        return core + 2 * math.exp(-(self.tail**2) / 2) / self.tail

    def standard_quantile(self, probability: float) -> float:
        """Return the z that the standardised law exceeds with ``probability`` (at most one
        half).
        """
        beyond = math.exp(-(self.tail**2) / 2) / self.tail / self.standard_mass
        if probability < beyond:
            return self.tail + math.log(beyond / probability) / self.tail
        return float(
            scipy.special.ndtri(
                0.5 + (0.5 - probability) * self.standard_mass / math.sqrt(2 * math.pi)
            )
        )

    def magnitudes(self, values: npt.ArrayLike) -> FloatArray:
        """Return the distances between floor and 2, [N]; non-finite ones become 2, and a negative
        is a UsageError.
        """
        values_N = np.asarray(values, dtype=np.float64)
        negative = values_N[np.isfinite(values_N) & (values_N < 0)]
        if negative.size:
            seen = f"distance {negative[0]}"
            do = "pass norms, not residuals"
            raise UsageError(seen, wanted="L2 distances, at least 0", do=do)
        return np.maximum(_clipped_size(values_N), self.floor)

    def log_density(self, magnitudes_N: FloatArray, multiple: float) -> FloatArray:
        """Return the logarithm of the density of x = ln L2 for distances ``multiple`` times larger,
        [N].
        """
        z_N = np.abs(np.log(magnitudes_N) - self.mu - math.log(multiple)) / self.sd
        return -np.asarray(scipy.special.huber(self.tail, z_N), np.float64) - math.log(
            self.sd * self.standard_mass
        )

    def log_likelihoods(self, distances: npt.ArrayLike, logs_C: FloatArray) -> FloatArray:
        """Return the logarithm of the density of distances [N] that are exp(logs) times larger, [N,
        C].
        """
        size_N = self.magnitudes(distances)
        return np.stack([self.log_density(size_N, math.exp(log)) for log in logs_C], axis=1)

    def survival(self, magnitudes_N: FloatArray) -> FloatArray:
        """Return P(honest distance ≥ L2), [N]."""
        z_N = (np.log(magnitudes_N) - self.mu) / self.sd
        size_N = np.abs(z_N)
        core_N = math.sqrt(2 * math.pi) * (0.5 - scipy.special.ndtr(np.minimum(size_N, self.tail)))
        tail_N = (
            -np.exp(-(self.tail**2) / 2)
            * np.expm1(-self.tail * np.maximum(size_N - self.tail, 0))
            / self.tail
        )
        upper_N = 0.5 + (core_N - tail_N) / self.standard_mass
        return np.asarray(np.where(z_N >= 0, upper_N, 1 - upper_N), dtype=np.float64)


NoiseLaw = ScaleNoise | LogNoise
"""The kinds of residual that `SequentialTest` can judge."""


@dataclass(frozen=True, slots=True)
class Spread(Strict):
    """The law of the scale of one machine over that of a noise law: ln scale ~ sd · t.

    A test that takes the scale for known accuses honest machines that are a little noisier than
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
        """A few multiples of the scale and their probabilities, [J] each, for the likelihoods of
        cheats.
        """
        return self._grid(_ATOMS)

    @property
    def fine(self) -> tuple[FloatArray, FloatArray]:
        """Multiples of the scale and their probabilities, [H] each, so close that no life tells
        neighbours apart.

        Between scales too far apart, a cheat in a small share explains an honest machine better
        than either scale. With :attr:`atoms`, a sixth of all honest nodes were accused over 58 400
        nonces; with these, none.
        """
        points = 2 * math.ceil(REACH * max(4, self.sd / _CLOSE)) + 1
        return self._grid(np.linspace(-REACH, REACH, points))

    def _grid(self, deviations_J: FloatArray) -> tuple[FloatArray, FloatArray]:
        if self.sd == 0:
            return np.ones(1), np.ones(1)
        weight_J = scipy.stats.t.pdf(deviations_J, self.dof)
        return np.exp(self.sd * deviations_J), np.asarray(
            weight_J / weight_J.sum(), dtype=np.float64
        )


REACH = 4.5  # number of spreads to either side over which a test averages the scale of a machine
_ATOMS = np.linspace(-3.0, 3.0, 7)  # in spreads too
_CLOSE = 0.0125  # distance of ln scale

FEWEST_RESIDUALS = 16  # fewest honest residuals that a law is fitted to
SMALLEST_LOG_SD = 0.1  # least spread of ln L2 that is believed: 10 % of the distance
DOF = 4.0  # degrees of freedom of a measured law of distances
TAIL = 2.0  # start of the exponential tail of a measured law of vectors, in units of sd

# Quantile of honest distances of vectors that, with their median, gives sd: only large distances
# accuse. Shapes are fixed and sizes quantiles, because a test does not believe a law's tail:
# residuals price its bets (`fair_bets`).
UPPER = 0.9


def fit_scale_noise(residuals: npt.ArrayLike) -> tuple[ScaleNoise, float]:
    """Fit the scale of honest residuals of a distance, [N], by the median of their sizes.

    It comes with the standard error of its logarithm. Residuals that are mostly zero, as on
    identical hardware, give sigma = `RESOLUTION`. Too few residuals are a UsageError, and so is one
    that is not finite.
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
    """Fit location and scale of the logarithms of honest L2 distances, by two of their quantiles.

    The law comes with the standard error of its location, and with the other arguments as its
    parameters. Distances [N] that are all below ``floor`` give mu = ln floor and the least spread
    believed. Too few distances are a UsageError, and so is one that is negative or not finite, or a
    parameter out of range.
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
        seen = (
            f"{values_N.size} residuals, {np.count_nonzero(~np.isfinite(values_N))} of them not "
            f"finite"
        )
        do = "measure more nonces, and find out why any are not finite"
        raise UsageError(
            seen, wanted=f"at least {FEWEST_RESIDUALS} finite residuals of honest nonces", do=do
        )
    return values_N


CAPS = np.exp(np.arange(0.5, 9.0, 0.5))  # largest likelihood ratios among which a bet chooses
_BET_SHARE = 0.1  # share of cheap nonces for which the cap of a bet is chosen


def fair_bets(
    law: NoiseLaw, honest: npt.ArrayLike, multiples_M: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return the caps and prices that make likelihood ratios fair bets under honest residuals [N]
    themselves, [M] each.

    The ratio R = f_m/f_1 of noise m times larger is cut off at a cap c and divided by a price::

        price = max(1, (Σ_i min(R(x_i), c) + c) / (N + 1))

    docs/statistics.md says why that is fair (Vovk, "Conformal e-prediction", 2025). Of all caps the
    one is taken with which wealth grows fastest against a node that computes a tenth of its nonces
    m times as badly.
    """
    size_N = law.magnitudes(honest)

    def ratios(sizes_N: FloatArray, multiple: float) -> FloatArray:
        return np.exp(
            np.minimum(
                law.log_density(sizes_N, multiple) - law.log_density(sizes_N, 1.0), LARGEST_LOG
            )
        )

    caps = []
    prices = []
    for multiple in multiples_M:
        honest_CN = np.minimum(ratios(size_N, multiple), CAPS[:, None])
        cheap_CN = np.minimum(ratios(law.magnitudes(multiple * size_N), multiple), CAPS[:, None])
        price_C = np.maximum(1.0, (honest_CN.sum(axis=1) + CAPS) / (size_N.size + 1))
        honest_C, cheap_C = (
            np.log1p(_BET_SHARE * (bet_CN / price_C[:, None] - 1)).mean(axis=1)
            for bet_CN in (honest_CN, cheap_CN)
        )
        best = int(np.argmax((1 - _BET_SHARE) * honest_C + _BET_SHARE * cheap_C))
        caps.append(CAPS[best])
        prices.append(price_C[best])
    return np.array(caps), np.array(prices)
