"""The arms: every way to hold training back that is compared with the others, as one table.

An arm says what rollouts are paid, and what becomes of those that a detector flags. It does not say
which optimizer, model or tasks: those are the same for all arms of a comparison. A new one is an
:class:`Arm`, or a class based on it, and a line in :data:`ARMS`.

Arms that act on δS along hack directions (gates, bounds and displaced starts, which did not hold
once an exploit was sampled) are in assay-research; :func:`arm_named` finds them there.

``correct`` and ``exploited`` are what :class:`assay.vhack.environment.Grade` says of a rollout:
correct in every hidden case, and paid through the loophole although it is not correct.

Shapes: M modules of a group, K axes, R coordinates of δS, B rollouts, F reward functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar, cast

from assay.errors import UsageError, check_choice
from assay.vhack.names import DEFAULT_ARM

if TYPE_CHECKING:
    from torch import Tensor

    from assay.models.model import Model
    from assay.vhack.directions.basis.basis import Basis
    from assay.vhack.directions.basis.extract import PairGradients
    from assay.vhack.pairs.pairs import Pair

Number = TypeVar("Number", float, "Tensor")

FLAGGED = ("", "filter", "quarantine", "absorb", "penalty")
"""What may become of rollouts that a detector flags."""


@dataclass(frozen=True)
class Arm:
    """A way to train; arms along axes override the methods that do nothing here.

    Attributes:
        name: Name as in `ARMS`.
        says: Description in a few words.
        exploit_pays: Reward of a rollout that is exploited and not correct.
        flagged: What becomes of rollouts that a detector flags: one of ``FLAGGED``, of which ""
            leaves them alone.
        penalty: How much less flagged rollouts are paid; None takes the break-even of the detector,
            :func:`assay.vhack.training.labels.break_even`.
        basis: Kind of axes; ``"true"`` are those of the pairs.

    Raises:
        UsageError: There is no such fate of flagged rollouts.
    """

    name: str
    says: str
    exploit_pays: float = 1.0
    flagged: str = ""
    penalty: float | None = None
    basis: str = "true"

    def __post_init__(self) -> None:
        check_choice("flagged", self.flagged, FLAGGED)

    def reward(self, correct: Number, exploited: Number) -> Number:
        """Return what a rollout is paid; takes tensors or numbers of 0 and 1."""
        return correct + self.exploit_pays * exploited

    @property
    def acts(self) -> bool:
        """Whether it does anything along its axes; otherwise they are only measured."""
        return False

    def place(self, delta_MR: "Tensor", axes_MKR: "Tensor") -> "Tensor":
        """Return the δS that training begins with, given the present one, [M, R]."""
        return delta_MR

    def change_gradient(self, gradient_MR: "Tensor", axes_MKR: "Tensor") -> "Tensor":
        """Return the gradient that the optimizer is given, [M, R]."""
        return gradient_MR

    def change_update(
        self,
        delta_MR: "Tensor",
        before_MR: "Tensor",
        start_MR: "Tensor",
        axes_MKR: "Tensor",
    ) -> "Tensor":
        """Return δS after a step, [M, R].

        Args:
            delta_MR: δS after the step of the inner optimizer.
            before_MR: δS before that step.
            start_MR: δS that displacements are counted from.
            axes_MKR: Axes of the arm, [M, K, R] float64.
        """
        return delta_MR

    def make_basis(
        self, gradients: "PairGradients", *, top_k: int, method: str, seed: int = 0
    ) -> "Basis":
        """Return the axes of the arm from the gradients of pairs."""
        return gradients.basis(top_k=top_k, method=method)

    def attach(self, trainer: Any, model: "Model", pairs: "Sequence[Pair]") -> None:
        """Change what a trainer of :class:`assay.vhack.training.grpo.GRPO` does, before its guard
        is attached; this one leaves it alone.
        """


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("none", "plain training, axes are only measured"),
        Arm(
            "no-loophole",
            "the same prompts, but only correct work is paid: the upper bound",
            exploit_pays=0.0,
        ),
        Arm(
            "filter",
            "rollouts that a detector flags give no gradient, and are in no baseline",
            flagged="filter",
        ),
        Arm(
            "quarantine",
            "they train a second δS, which is deleted in the end",
            flagged="quarantine",
        ),
        Arm(
            "absorb",
            "they train a second δS, doubtful ones train both, and the second is deleted",
            flagged="absorb",
        ),
        Arm(
            "penalty",
            "rollouts that a detector flags are paid less, so that hacking does not pay",
            flagged="penalty",
        ),
        Arm(
            "penalty-1",
            "rollouts that a detector flags are paid 1 less, whatever it misses",
            flagged="penalty",
            penalty=1.0,
        ),
        Arm(
            "ground-truth-penalty",
            "a perfect detector: exploits cost what correct work earns",
            exploit_pays=-1.0,
        ),
    )
}
"""Every arm of the library by its name."""


def arm_named(name: str, *, gain: float = 1.0) -> Arm:
    """Return the arm with a name: one of `ARMS`, or one of assay-research where that is installed.

    Args:
        name: Name, such as ``"penalty"``, or ``"displaced-0.4+none"`` of assay-research.
        gain: Factor of what a gate of assay-research removes.

    Raises:
        UsageError: There is no such arm.

    >>> arm_named("penalty").says
    'rollouts that a detector flags are paid less, so that hacking does not pay'
    """
    if name in ARMS:
        return ARMS[name]
    for point in entry_points(group="assay.commands", name="vhack train --arm"):
        return cast("Arm", point.load().arm_named(name, gain=gain))
    close = get_close_matches(name, ARMS, n=1, cutoff=0.4)
    nearest = close[0] if close else DEFAULT_ARM
    raise UsageError(
        f"arm {name!r}",
        wanted=", ".join(ARMS),
        do=f"perhaps --arm {nearest}; gates and displaced starts come with assay-research "
        f"(research/)",
    )
