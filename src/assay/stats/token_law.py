"""The law of sampled tokens: the chance of a claimed token where two engines' scores differ.

    p_σ(v) = exp(−gap_v/σ) / Σ_w exp(−gap_w/σ)

docs/statistics.md ("Tokens of responses") says what the gaps are, and why p_σ is the chance of
token v where scores differ at the scale σ, in units of the logits. The *profile* of a claimed token
is its log p_σ on a fixed grid of σ, and ln 1/V: the law of a token that does not depend on the
scores. An honest law is a mixture over that grid. So every law, every larger noise and every share
of it is one vector of weights.

Suffixes: N values, G columns of a profile, C scales.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from assay.errors import UsageError
from assay.stats.chord import FloatArray
from assay.stats.noise_laws import StrictLaw

SCALES: FloatArray = np.exp2(np.arange(-20, 7, dtype=np.float64))
"""Scales σ of a profile, in units of the logits: from the rounding of float32 to anything."""

COLUMNS = SCALES.size + 1
"""Number of columns of a profile: the scales, and 1/V."""

LEAST_LOG = -6e4
"""Logarithm of the smallest probability of a profile, which float16 can represent."""

LEAST_STRAY = 1e-6
"""Smallest share of stray tokens, which do not depend on the scores."""


@dataclass(frozen=True, slots=True)
class TokenNoise(StrictLaw):
    """The law of claimed tokens: weights of :data:`SCALES`, and of stray tokens.

    Args:
        weights: Weight of every column of a profile; they sum to 1.

    Raises:
        UsageError: The weights are not probabilities, or leave no room for a stray token.
    """

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        total = math.fsum(self.weights)
        are_shares = all(0 <= weight <= 1 for weight in self.weights)
        is_law = len(self.weights) == COLUMNS and are_shares and abs(total - 1) <= 1e-9
        if not is_law or self.weights[-1] < LEAST_STRAY * 0.999:
            raise UsageError(
                f"{len(self.weights)} weights of a law of tokens with sum {total:.6g}",
                wanted=f"{COLUMNS} probabilities with sum 1, the last at least {LEAST_STRAY:g}",
                do="check the calibration that this law comes from",
            )

    @property
    def size(self) -> float:
        """The 90 % quantile of the scales of differences, in units of the logits."""
        cumulated = np.cumsum(self.weights[:-1])
        return float(SCALES[int(np.searchsorted(cumulated, 0.9 * cumulated[-1]))])

    @property
    def junk_multiple(self) -> float:
        """Multiple of this noise at which a token hardly depends on the scores."""
        return max(4.0, float(SCALES[-3]) / self.size)

    def scaled(self, factor: float) -> Self:
        """Return the law of differences ``factor`` times larger."""
        return type(self)(tuple(self.weights_at(np.array([math.log(factor)]))[:, 0]))

    def weights_at(self, logs_C: FloatArray) -> FloatArray:
        """Return the weights of the law with all its scales multiplied by exp(logs), [G, C]."""
        weight_G = np.array(self.weights)
        return np.stack([shift_matrix(float(log)) @ weight_G for log in logs_C], axis=1)

    def log_likelihoods(self, profiles_NG: npt.ArrayLike, logs_C: FloatArray) -> FloatArray:
        """Return the log-probability of tokens under the law scaled by exp(logs), [N, C]."""
        chances_NG = np.exp(np.asarray(profiles_NG, dtype=np.float64))
        return np.asarray(np.log(chances_NG @ self.weights_at(logs_C)), dtype=np.float64)


def shift_matrix(log: float) -> FloatArray:
    """Return the matrix [G, G] that maps weights to those of the law scaled by exp(log).

    A scale between two of the grid is a mixture of these. A scale beyond the grid becomes its end.
    """
    count = SCALES.size
    columns = np.arange(count)
    shifted = np.clip(columns + log / math.log(2), 0, count - 1)
    # So that low + 1 is on the grid.
    low = np.minimum(shifted.astype(int), count - 2)
    matrix = np.zeros((COLUMNS, COLUMNS))
    matrix[low, columns] = 1 - (shifted - low)
    matrix[low + 1, columns] += shifted - low
    matrix[-1, -1] = 1
    return matrix


def round_profiles(profiles_NG: npt.ArrayLike) -> FloatArray:
    """Return profiles as they are stored: not below :data:`LEAST_LOG`, and rounded to float16."""
    clipped = np.maximum(np.asarray(profiles_NG, dtype=np.float64), LEAST_LOG)
    # A host program may have set numpy to raise.
    with np.errstate(under="ignore"):
        rounded = clipped.astype(np.float16)
    return rounded.astype(np.float64)
