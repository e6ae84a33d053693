"""The chord law: the distance x of a random direction in R^d from a fixed one.

    (x/2)² ~ Beta(a, a),    a = (d − 1)/2

It is exact (Fang, Kotz and Ng 1990, §3.1); docs/statistics.md derives it. Dimensions below 2 are
refused.
"""

import math

import numpy as np
import numpy.typing as npt
import scipy

from assay.errors import UsageError

FloatArray = npt.NDArray[np.float64]

RANDOM_HEAD_ROWS = 8192
"""Rows of the published random head, the dimension in which distances of `poc-2.0` are measured."""

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
