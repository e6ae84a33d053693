"""Noise laws: what honest recomputation looks like, and what the same values look like when it is not honest.

A law describes a residual by its honest density f₁ and a family f_m, the same noise m times larger. Both laws here have
monotone likelihood ratios: f_m(x)/f₁(x) never falls as the residual grows. So a value closer to the recomputed one
never counts against a node, and noise smaller than calibrated only makes the test more cautious (docs/statistics.md).

Suffixes: N values.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from assay.errors import UsageError
from assay.stats._chord import RANDOM_HEAD_ROWS, chord_cdf, chord_mean, chord_std

FloatArray = npt.NDArray[np.float64]

RESOLUTION = 2.0**-23
"""Spacing of fp32 numbers around √2: two distances cannot agree better than this, unless they are equal."""

GROSS_PROBABILITY = 1e-4
"""A residual that honest noise exceeds with this probability at most is counted as gross."""

JUNK_SIGMA = chord_std(RANDOM_HEAD_ROWS)
"""Residual of the best invented distance for ``poc-2.0``, the constant √2 (0.0078).

A distance drawn from the chord law misses by √2 times as much (0.011) and is easier to catch.
"""

_LARGEST = 2.0  # largest difference of two distances, and of two unit vectors


class NoiseLaw(Protocol):
    """What `SequentialTest` needs to know about a kind of residual."""

    @property
    def junk_multiple(self) -> float:
        """How many times larger than honest noise the residual of an invented value is."""

    @property
    def gross_threshold(self) -> float:
        """Magnitude that honest noise exceeds with probability `GROSS_PROBABILITY`."""

    @property
    def junk_detection(self) -> float:
        """Probability that an invented value lands above `gross_threshold`."""

    def magnitudes(self, values: npt.ArrayLike) -> FloatArray:
        """Sizes of the residuals, [N]; a non-finite one becomes the largest there can be."""

    def log_density(self, magnitudes_N: FloatArray, multiple: float) -> FloatArray:
        """Logarithm of f_m at the given magnitudes, [N], for noise ``multiple`` times the honest one."""

    def survival(self, magnitudes_N: FloatArray) -> FloatArray:
        """Probability that honest noise is at least so large, [N]."""


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

    Attributes:
        sigma: scale of honest noise, in units of the distance; at least `RESOLUTION`.
        dof: degrees of freedom of Student's t; smaller means heavier tails.
        junk_sigma: standard deviation of the residual of an invented value, by default `JUNK_SIGMA`.

    Raises:
        UsageError: a parameter is not finite or out of range.
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
        """Absolute residual that honest noise exceeds with probability `GROSS_PROBABILITY`."""
        return self.sigma * float(stats.t.isf(GROSS_PROBABILITY / 2, self.dof))

    @property
    def junk_detection(self) -> float:
        """P(|N(0, junk_sigma²)| > gross threshold)."""
        return float(special.erfc(self.gross_threshold / self.junk_sigma / math.sqrt(2)))

    def magnitudes(self, values: npt.ArrayLike) -> FloatArray:
        """|e|, at most 2, [N]; non-finite residuals become 2."""
        return _clipped_size(values)

    def log_density(self, magnitudes_N: FloatArray, multiple: float) -> FloatArray:
        """Logarithm of the density of multiple · sigma · t at the given |e|, [N]."""
        scale, half = multiple * self.sigma, (self.dof + 1) / 2
        constant = special.gammaln(half) - special.gammaln(self.dof / 2) - math.log(self.dof * math.pi) / 2
        z_N = magnitudes_N / scale
        return np.asarray(constant - math.log(scale) - half * np.log1p(z_N * z_N / self.dof), dtype=np.float64)

    def survival(self, magnitudes_N: FloatArray) -> FloatArray:
        """P(|sigma · t| ≥ |e|), [N]."""
        return np.asarray(2 * stats.t.sf(magnitudes_N / self.sigma, self.dof), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class LogNoise:
    """L2 distances of published vectors: x = ln max(L2, floor), normal up to ``tail`` sd and exponential beyond.

    The density is exp(−ρ(z))/c with z = (x − mu)/sd and Huber's ρ. It is log-concave, which makes the ratio monotone.
    Its tail is a power law in L2, as measured noise has it (routing flips, ties). Noise m times larger is the same
    density shifted by ln m.

    Attributes:
        mu: location of x for honest noise, in ln L2.
        sd: scale of x.
        dimension: Length of the vectors; an invented unit vector lies a chord-law distance away.
        tail: Start of the exponential tail, in units of sd.
        floor: Distance below which values are not told apart (the rounding of fp16 vectors).

    Raises:
        UsageError: a parameter is not finite or out of range.
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
        """Mean distance of an invented vector over the typical honest distance."""
        return chord_mean(self.dimension) / math.exp(self.mu)

    @property
    def gross_threshold(self) -> float:
        """L2 distance that honest noise exceeds with probability `GROSS_PROBABILITY`."""
        return math.exp(self.mu + self.sd * self.standard_quantile(GROSS_PROBABILITY))

    @property
    def junk_detection(self) -> float:
        """Probability under the chord law of a distance above the gross threshold."""
        return 1 - float(chord_cdf(self.gross_threshold, self.dimension))

    @property
    def standard_mass(self) -> float:
        """∫ exp(−ρ(z)) dz: the normal core and the two exponential tails."""
        core = math.sqrt(2 * math.pi) * math.erf(self.tail / math.sqrt(2))
        return core + 2 * math.exp(-(self.tail**2) / 2) / self.tail

    def standard_quantile(self, probability: float) -> float:
        """The z that the standardised law exceeds with ``probability`` (at most one half)."""
        beyond = math.exp(-(self.tail**2) / 2) / self.tail / self.standard_mass
        if probability < beyond:
            return self.tail + math.log(beyond / probability) / self.tail
        return float(special.ndtri(0.5 + (0.5 - probability) * self.standard_mass / math.sqrt(2 * math.pi)))

    def magnitudes(self, values: npt.ArrayLike) -> FloatArray:
        """The distances between floor and 2, [N]; non-finite ones become 2.

        Raises:
            UsageError: a distance is negative.
        """
        values_N = np.asarray(values, dtype=np.float64)
        negative = values_N[np.isfinite(values_N) & (values_N < 0)]
        if negative.size:
            raise UsageError(
                f"distance {negative[0]}", wanted="L2 distances, at least 0", do="pass norms, not residuals"
            )
        return np.maximum(_clipped_size(values_N), self.floor)

    def log_density(self, magnitudes_N: FloatArray, multiple: float) -> FloatArray:
        """Logarithm of the density of x = ln L2 for distances ``multiple`` times larger, [N]."""
        z_N = np.abs(np.log(magnitudes_N) - self.mu - math.log(multiple)) / self.sd
        return -np.asarray(special.huber(self.tail, z_N), dtype=np.float64) - math.log(self.sd * self.standard_mass)

    def survival(self, magnitudes_N: FloatArray) -> FloatArray:
        """P(honest distance ≥ L2), [N]."""
        z_N = (np.log(magnitudes_N) - self.mu) / self.sd
        size_N = np.abs(z_N)
        core_N = math.sqrt(2 * math.pi) * (0.5 - special.ndtr(np.minimum(size_N, self.tail)))
        tail_N = -np.exp(-(self.tail**2) / 2) * np.expm1(-self.tail * np.maximum(size_N - self.tail, 0)) / self.tail
        upper_N = 0.5 + (core_N - tail_N) / self.standard_mass
        return np.asarray(np.where(z_N >= 0, upper_N, 1 - upper_N), dtype=np.float64)
