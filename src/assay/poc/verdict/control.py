"""Controls: more computations of every nonce, which say how hard it is for any machine."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Self

import numpy as np
import numpy.typing as npt
import scipy
from pydantic import Field

from assay.stats.chord import FloatArray
from assay.stats.noise_laws import StrictLaw

# A residual of a control over its typical size, or below it.
FARTHEST = 16.0
WORTH = 0.9  # spread of ln residual that a control may leave at most
# typical residual of an honest node, over the smallest, of a computation that tells how far off a
# node is
NEAR = 2.0
_Format = Annotated[str, Field(min_length=1, max_length=64)]
_Typical = tuple[Annotated[float, Field(ge=1e-12, le=2.0)], ...]


@dataclass(frozen=True, kw_only=True)
class Control(StrictLaw):
    """One or two more honest computations of every nonce, which show how hard it is.

    A residual counts as a *score*: the geometric mean of the node's residuals from the validator's
    computations, over those between these computations, each to a power of its own, all in units of
    what is typical. Computations in a coarser format than the best are left out of the mean: their
    own noise hides how far off the node is.
    """

    of: _Format  # number format of the validator's first computation
    dtypes: Annotated[tuple[_Format, ...], Field(min_length=1, max_length=2)]  # those of the others
    usual: _Typical  # residual of an honest node from each computation, the first one first
    sizes: _Typical  # residual between each two of them, in the order of `itertools.combinations`
    # Slopes of ln of the mean on those of each, if honest.
    powers: tuple[Annotated[float, Field(ge=0, le=1)], ...]

    def __post_init__(self) -> None:
        count = len(self.dtypes) + 1
        fits = len(self.usual) == count and len(self.sizes) == len(self.powers) == math.comb(
            count, 2
        )
        # A sum that was divided by itself may round up.
        if not fits or not 0 < sum(self.powers) <= 1 + 1e-9:
            raise ValueError(
                f"sizes or powers of other computations than of {self.of} and "
                f"{', '.join(self.dtypes)}"
            )

    @classmethod
    def measured(
        cls, pairs: Sequence[tuple[FloatArray, FloatArray]], *, of: str, dtypes: Sequence[str]
    ) -> Self | None:
        """Fit the control to residuals [E, N] of honest machines and those between them [P, N].

        It is None where it takes less than a tenth of the spread of the logarithms away, and is not
        worth its price.
        """
        if (
            not pairs
            or min(
                float(np.median(np.abs(logs_of_pair), axis=1).min())
                for pair in pairs
                for logs_of_pair in pair
            )
            == 0.0
        ):
            # Machines that agree to the bit.
            return None
        usual, sizes = (
            tuple(np.median(np.abs(np.hstack(side)), axis=1).tolist())
            for side in zip(*pairs, strict=True)
        )
        even = cls(
            of=of,
            dtypes=tuple(dtypes),
            usual=usual,
            sizes=sizes,
            powers=(1 / len(sizes),) * len(sizes),
        )
        logs = [
            np.vstack([even._node(node_EN), even._between(between_PN)])
            for node_EN, between_PN in pairs
        ]
        node_N, *between_PN = np.hstack(
            [logs_of_pair - np.median(logs_of_pair, axis=1, keepdims=True) for logs_of_pair in logs]
        )
        powers_P, _ = scipy.optimize.nnls(np.transpose(between_PN), node_N)
        powers_P /= max(1.0, powers_P.sum())
        worth = bool(np.std(node_N - powers_P @ between_PN) < WORTH * np.std(node_N))
        return replace(even, powers=tuple(powers_P.tolist())) if worth else None

    def scores(self, node_EN: npt.ArrayLike, between_PN: npt.ArrayLike) -> FloatArray:
        """Return scores [N] in units of the first residual, from residuals [E, N] and [P, N].

        A residual between computations counts as `FARTHEST` times its typical size at most, and as
        typical where it is zero or not finite, so it excuses no node. One of the node counts as a
        `FARTHEST`-th of its typical size at least: to equal one computation excuses little. Where
        one is missing, so is the score.
        """
        return np.asarray(
            self.usual[0] * np.exp(self._node(node_EN) - self.powers @ self._between(between_PN))
        )

    def _node(self, node_EN: npt.ArrayLike) -> FloatArray:
        near_E = np.array(self.usual) <= NEAR * min(self.usual)
        over_EN = (np.abs(np.asarray(node_EN, dtype=np.float64)) / np.array(self.usual)[:, None])[
            near_E
        ]
        return np.asarray(np.log(np.maximum(over_EN, 1 / FARTHEST)).mean(axis=0))

    def _between(self, between_PN: npt.ArrayLike) -> FloatArray:
        over_PN = np.abs(np.asarray(between_PN, dtype=np.float64)) / np.array(self.sizes)[:, None]
        says = np.isfinite(over_PN) & (over_PN > 0)
        return np.log(np.where(says, np.clip(over_PN, 1 / FARTHEST, FARTHEST), 1.0))
