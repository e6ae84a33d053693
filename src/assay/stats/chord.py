"""The chord law: the distance x of a random direction in R^d from a fixed one.

    (x/2)² ~ Beta(a, a),    a = (d − 1)/2

It is exact (Fang, Kotz and Ng 1990, §3.1); docs/statistics.md derives it. Dimensions below 2 are
refused.

The law of the distances of a block is a chord law whose cosines are all wider or narrower:

    γ² ~ χ²_ν/ν,    ν = 1/‖M‖²,    M = E[x xᵀ]

γ is the factor of the cosines of a block: unit states x with second moments M have products with
the folded head v of variance γ² = vᵀMv. Over blocks that is Σ λᵢχ²₁ with the eigenvalues λ of M;
the law has the same mean and variance (Satterthwaite 1946; Box 1954, theorem 3.1).
docs/statistics.md derives it.

ν is the *effective dimension* of the states: D where all directions of R^D occur alike. Signs drawn
per nonce make M diagonal and keep the energy of a coordinate. A reflection in a random hyperplane
keeps 1 − 4/D + 8/(D(D + 2)) of what M has beyond I/D; eight of them keep 88 % at D = 256.

Suffixes: F values of γ, D hidden size.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import scipy

from assay.errors import UsageError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

RANDOM_HEAD_ROWS = 8192
"""Rows of the published random head, the dimension in which distances of `poc-2.0` are measured."""

# Values of γ of equal probability by which the law of a block is represented.
_FACTORS = 512

# Above this a, the asymptotic series is more precise than differences of log-gamma.
_SERIES_FROM = 50.0


def _half_dimension(d: int) -> float:
    if d < 2:
        raise UsageError(
            f"dimension {d}",
            wanted="a whole number of at least 2",
            do="pass the output dimension",
            field="d",
        )
    return (d - 1) / 2


def _log_mean_over_sqrt2(d: int) -> float:
    """Return ln(E[x]/√2), from E[x] = 2·Γ(a + ½)Γ(2a) / (Γ(a)Γ(2a + ½))."""
    a = _half_dimension(d)
    if a > _SERIES_FROM:
        # From the series of ln Γ(a + ½) − ln Γ(a) (DLMF 5.11.8), at a and 2a:
        # ½ ln a − 1/(8a) + 1/(192a³) − 1/(640a⁵) + …
        return -1 / (16 * a) + 7 / (1536 * a**3) - 31 / (20480 * a**5)
    ln_gamma = scipy.special.gammaln
    log_mean = ln_gamma(a + 0.5) - ln_gamma(a) + ln_gamma(2 * a) - ln_gamma(2 * a + 0.5)
    return float(log_mean + math.log(2) / 2)


def chord_mean(d: int) -> float:
    """Return the mean distance of a random direction in R^d, in closed form; it tends to √2."""
    return math.sqrt(2) * math.exp(_log_mean_over_sqrt2(d))


def chord_std(d: int) -> float:
    """Return the standard deviation of the distance in R^d; it tends to 1/√(2d).

    E[x²] is exactly 2.
    """
    return math.sqrt(-2 * math.expm1(2 * _log_mean_over_sqrt2(d)))


def chord_cdf(x: npt.ArrayLike, d: int) -> FloatArray:
    """Return P(distance ≤ x) in R^d, elementwise; 0 below x = 0 and 1 above x = 2."""
    inside = np.clip(np.asarray(x, dtype=np.float64), 0.0, 2.0)
    a = _half_dimension(d)
    return np.asarray(scipy.special.betainc(a, a, (inside / 2) ** 2), dtype=np.float64)


def valid_rate(r_target: float, d: int) -> float:
    """Return the share of random directions of R^d with a distance below ``r_target``.

    It is the expected rate of valid nonces. A UsageError refuses an ``r_target`` outside (0, 2],
    and a dimension below 2.
    """
    return float(chord_cdf(check_r_target(r_target), d))


def check_r_target(r_target: float) -> float:
    """Return an ``r_target`` in (0, 2]; another one is a UsageError."""
    if not 0.0 < r_target <= 2.0:
        raise UsageError(
            f"r_target {r_target}",
            wanted="a distance in (0, 2]",
            do="derive one with r_target_for",
            field="r_target",
        )
    return r_target


def r_target_for(rate: float, d: int) -> float:
    """Return the ``r_target`` at which a share ``rate`` is valid: the inverse of `valid_rate`.

    For large d it is close to √(2 − 2·z/√d), z the standard normal quantile of 1 − rate. A
    UsageError refuses a ``rate`` outside (0, 1], and a dimension below 2.
    """
    if not 0.0 < rate <= 1.0:
        raise UsageError(
            f"valid rate {rate}", wanted="a share in (0, 1]", do="give 0.1 for 10 %", field="rate"
        )
    a = _half_dimension(d)
    return 2 * math.sqrt(float(scipy.special.betaincinv(a, a, rate)))


def rate_standard_error(rate: float, n: int) -> float:
    """Return the standard error √(p(1 − p)/n) of a rate p of n independent nonces.

    A UsageError refuses a rate outside [0, 1], and n below 1.
    """
    if not 0.0 <= rate <= 1.0 or n < 1:
        raise UsageError(
            f"rate {rate} of {n} nonces",
            wanted="a rate in [0, 1] of at least 1 nonce",
            do="check both",
        )
    return math.sqrt(rate * (1 - rate) / n)


@dataclass(frozen=True, kw_only=True)
class BlockLaw:
    """The law of the distances of a block: γ² ~ scale²·χ²_ν/ν.

    Under the signs of a nonce, a state x has the product Σ ±vᵢxᵢ with the folded head, which is
    taken as normal. Where one coordinate outweighs the others, as in the widest blocks, it is not,
    and a rate is off by half a point at most.

    Args:
        dimension: Dimension d of the chord law.
        freedom: Degrees of freedom ν: the effective dimension of the states if nothing is known of
            the block, and infinity if γ equals ``scale``.
        scale: Known scale of γ; 1.0 for any block.

    Raises:
        UsageError: A value is not positive.
    """

    dimension: int
    freedom: float
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not (self.freedom > 0 and 0 < self.scale < math.inf):
            raise UsageError(
                f"an effective dimension of {self.freedom} and a scale of {self.scale}",
                wanted="positive numbers",
                do="measure the effective dimension with `assay poc calibrate --model M`",
            )

    def factor(self, q: float) -> float:
        """Return the quantile of the factor γ over such blocks."""
        if math.isinf(self.freedom):
            return self.scale
        return self.scale * math.sqrt(float(scipy.stats.chi2.ppf(q, self.freedom)) / self.freedom)

    @property
    def factor_error(self) -> float:
        """Standard deviation of γ, to first order: scale/√(2ν)."""
        return self.scale / math.sqrt(2 * self.freedom)

    def valid_rate(self, r_target: float) -> float:
        """Return the expected share of nonces with a distance below ``r_target``.

        A UsageError refuses an ``r_target`` outside (0, 2].
        """
        return float(self._rates(np.asarray(check_r_target(r_target))).mean())

    def rate_error(self, r_target: float, n: int | None = None) -> float:
        """Return the standard error of the valid rate of such a block, and of its n nonces.

        Without n it is that of the block alone, which is about φ(z)·|z|/√(2ν) at a rate of Φ(z),
        which is 0 at one half. A UsageError refuses an ``r_target`` outside (0, 2], and an n below
        1.
        """
        of_block = float(self._rates(np.asarray(check_r_target(r_target))).std())
        if n is None:
            return of_block
        return math.hypot(of_block, rate_standard_error(self.valid_rate(r_target), n))

    def bins(self, edges: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Return the expected share between each two edges and its standard error."""
        shares = np.diff(self._rates(np.asarray(edges, dtype=np.float64)), axis=1)
        return np.asarray(shares.mean(axis=0)), np.asarray(shares.std(axis=0))

    def rate_interval(self, r_target: float) -> tuple[float, float]:
        """Return the interval that contains the valid rate of 95 % of such blocks.

        A UsageError refuses an ``r_target`` outside (0, 2].
        """
        cosine = 1 - check_r_target(r_target) ** 2 / 2
        narrow = float(chord_cdf(_chord(cosine / self.factor(0.025)), self.dimension))
        wide = float(chord_cdf(_chord(cosine / self.factor(0.975)), self.dimension))
        return min(narrow, wide), max(narrow, wide)

    def target_interval(self, r_target: float, confidence: float = 0.95) -> tuple[float, float]:
        """Return the interval of the quantile of a block that is ``r_target`` on average."""
        tail = (1 - confidence) / 2
        cosine = 1 - r_target**2 / 2
        narrow = float(_chord(cosine * self.factor(tail)))
        wide = float(_chord(cosine * self.factor(1 - tail)))
        return min(narrow, wide), max(narrow, wide)

    @cached_property
    def _factors(self) -> FloatArray:
        """Values of γ of equal probability, [F]."""
        points = 1 if math.isinf(self.freedom) else _FACTORS
        return np.array([self.factor((i + 0.5) / points) for i in range(points)])

    def _rates(self, x: FloatArray) -> FloatArray:
        """Return the share below x for every factor, [F, ...]."""
        factors = self._factors.reshape(-1, *(1,) * x.ndim)
        return chord_cdf(_chord((1 - x**2 / 2) / factors), self.dimension)


def _chord(cosine: npt.ArrayLike) -> FloatArray:
    return np.asarray(np.sqrt(2 - 2 * np.clip(cosine, -1.0, 1.0)))
