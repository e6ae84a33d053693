"""The chord law: the distance x of a random direction in R^d from a fixed one.

    (x/2)² ~ Beta(a, a),    a = (d − 1)/2

The direction is uniform on the unit sphere, at angle θ from the fixed one, with (1 + cos θ)/2 ~ Beta(a, a) (Fang, Kotz
and Ng 1990, §3.1) and x = √(2 − 2 cos θ). Everything below is exact. For large d the law is close to N(√2, 1/√(2d)).
"""

import math

import numpy as np
import numpy.typing as npt
from scipy import special

from assay.errors import UsageError

FloatArray = npt.NDArray[np.float64]

RANDOM_HEAD_ROWS = 8192
"""Rows of the published random head: the dimension in which the distances of ``poc-2.0`` are measured."""

_SERIES_FROM = 50.0  # above this a, the asymptotic series is more precise than differences of log-gamma


def _half_dimension(d: int) -> float:
    if d < 2:
        raise UsageError(f"dimension {d}", wanted="a whole number of at least 2", do="pass the output dimension")
    return (d - 1) / 2


def _log_mean_over_sqrt2(d: int) -> float:
    """Return ln(E[x]/√2), from E[x] = 2·Γ(a + ½)Γ(2a) / (Γ(a)Γ(2a + ½)).

    The series is that of ln Γ(a + ½) − ln Γ(a) = ½ ln a − 1/(8a) + 1/(192a³) − 1/(640a⁵) + … (DLMF 5.11.8), at a
    and 2a.
    """
    a = _half_dimension(d)
    if a > _SERIES_FROM:
        return -1 / (16 * a) + 7 / (1536 * a**3) - 31 / (20480 * a**5)
    log_mean = special.gammaln(a + 0.5) - special.gammaln(a) + special.gammaln(2 * a) - special.gammaln(2 * a + 0.5)
    return float(log_mean + math.log(2) / 2)


def chord_mean(d: int) -> float:
    """Return the mean distance of a random direction in R^d, in closed form; it tends to √2.

    Raises:
        UsageError: The dimension is below 2.
    """
    return math.sqrt(2) * math.exp(_log_mean_over_sqrt2(d))


def chord_std(d: int) -> float:
    """Return the standard deviation of the distance in R^d, from E[x²] = 2 exactly; it tends to 1/√(2d).

    Raises:
        UsageError: The dimension is below 2.
    """
    return math.sqrt(-2 * math.expm1(2 * _log_mean_over_sqrt2(d)))


def chord_cdf(x: npt.ArrayLike, d: int) -> FloatArray:
    """Return P(distance ≤ x) in R^d, elementwise; 0 below x = 0 and 1 above x = 2."""
    inside = np.clip(np.asarray(x, dtype=np.float64), 0.0, 2.0)
    a = _half_dimension(d)
    return np.asarray(special.betainc(a, a, (inside / 2) ** 2), dtype=np.float64)


def chord_pdf(x: npt.ArrayLike, d: int) -> FloatArray:
    """Return the density of the distance in R^d, elementwise, per unit of distance; 0 outside [0, 2]."""
    x_N = np.asarray(x, dtype=np.float64)
    a = _half_dimension(d)
    half_N = np.clip(x_N, 0.0, 2.0) / 2
    # The factor x of the substitution is part of the power: apart from it, the plane has 0 times infinity at x = 0.
    log_N = special.xlogy(d - 2, half_N) + special.xlog1py(a - 1, -(half_N**2)) - special.betaln(a, a)
    return np.asarray(np.where((x_N < 0) | (x_N > 2), 0.0, np.exp(log_N)), dtype=np.float64)


def valid_rate(r_target: float, d: int) -> float:
    """Return the share of nonces with a distance below ``r_target`` when outputs are random directions of R^d.

    Raises:
        UsageError: ``r_target`` is outside (0, 2], or the dimension is below 2.
    """
    if not 0.0 < r_target <= 2.0:
        raise UsageError(f"r_target {r_target}", wanted="a distance in (0, 2]", do="derive one with r_target_for")
    return float(chord_cdf(r_target, d))


def r_target_for(rate: float, d: int) -> float:
    """Return the ``r_target`` at which a share ``rate`` of random directions is valid: exact inverse of `valid_rate`.

    For large d it is close to √(2 − 2·z/√d), z the standard normal quantile of 1 − rate.

    Raises:
        UsageError: ``rate`` is outside (0, 1], or the dimension is below 2.
    """
    if not 0.0 < rate <= 1.0:
        raise UsageError(f"valid rate {rate}", wanted="a share in (0, 1]", do="give 0.1 for 10 %")
    a = _half_dimension(d)
    return 2 * math.sqrt(float(special.betaincinv(a, a, rate)))


def rate_standard_error(rate: float, n: int) -> float:
    """Return the standard error of a measured rate from n independent nonces, √(p(1 − p)/n).

    Raises:
        UsageError: ``rate`` is outside [0, 1] or n is below 1.
    """
    if not 0.0 <= rate <= 1.0 or n < 1:
        raise UsageError(f"rate {rate} of {n} nonces", wanted="a rate in [0, 1] of at least 1 nonce", do="check both")
    return math.sqrt(rate * (1 - rate) / n)
