"""The arms: every way to hold training back that is compared with the others, as one table.

Two things can be added to an arm by its name. ``displaced-A+ARM`` moves δS by A along every axis, away from the hack,
before the first step, and goes on as the arm: with ``none`` as plain training, with ``erase-update-two-sided`` it stays
there, and all learning is orthogonal to the axes. ``ARM+away-B`` bounds how far the arm may move away from the hack
along each axis, counted from the weights of the model: a counter-force with an end.

An arm says which axes are acted on, how, and what is paid. It does not say which optimiser, model or tasks: those are
the same for all arms of a comparison.

``correct`` and ``exploited`` are what :class:`assay.vhack.environment.Grade` says of a rollout: right in every hidden
case, and paid through the loophole although it is not.
"""

from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor

from assay.errors import UsageError
from assay.vhack.delta._gates import Box, Gate

__all__ = ["ARMS", "BASIS_KINDS", "Arm", "arm_named"]

Number = TypeVar("Number", float, Tensor)

BASIS_KINDS = ("true", "random", "shuffled", "clean-clean")
"""The axes an arm may act along, besides ``trusted``:

- ``true``: the hack directions of the pairs;
- ``random``: as many orthonormal axes, uniform among all of them;
- ``shuffled``: extracted from the same pairs with hack and clean exchanged in a random half of them. Which way the hack
  is is lost. By ``svd`` the plane stays, for a difference and its negative span the same line; by ``lda`` it is lost
  too, for half of what it whitens by are hacks;
- ``clean-clean``: extracted from differences between clean sides of different pairs.

:func:`assay.vhack.delta.basis_of_kind` makes them.
"""

TRUSTED = "trusted"
_START, _AWAY = "displaced-", "+away-"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: as in `ARMS`, with ``:KIND`` behind it where other axes than the true ones are acted on.
        says: what it does, in a few words.
        gate: what is taken away along the axes, of the gradient or of the update.
        level: where: ``"gradient"`` or ``"update"``.
        basis: which axes: one of ``BASIS_KINDS``, or ``"trusted"``, the directions of honest learning.
        box: bounds of the displacement along the axes.
        start: how far δS is moved along +v of every axis, away from the hack, before the first step.
        push: every step moves δS by ``push · lr`` along +v of every axis, away from the hack.
        exploit_pays: the reward of a rollout that is exploited and not correct.
        advantage: α of advantage modification, see :mod:`assay.vhack.delta._advantage`; 0 is none.
    """

    name: str
    says: str
    gate: Gate = field(default_factory=lambda: Gate("none"))
    level: str = "gradient"
    basis: str = "true"
    box: Box | None = None
    start: float = 0.0
    push: float = 0.0
    exploit_pays: float = 1.0
    advantage: float = 0.0

    @property
    def acts(self) -> bool:
        """Whether it does anything along its axes; otherwise they are only measured."""
        return self.gate.kind != "none" or self.box is not None or self.start != 0 or self.push != 0

    def reward(self, correct: Number, exploited: Number) -> Number:
        """What a rollout is paid; tensors or numbers of 0 and 1."""
        return correct + self.exploit_pays * exploited

    def along(self, kind: str) -> "Arm":
        """The same arm along other axes, its name ending in ``:KIND``; ``"true"`` is the arm itself.

        Raises:
            UsageError: there is no such kind, or the arm does not act along axes that could be others.
        """
        if kind == self.basis == "true":
            return self
        if kind not in BASIS_KINDS or not self.acts or self.basis != "true":
            raise UsageError(
                f"arm {self.name} along {kind} axes",
                wanted=f"one of {', '.join(BASIS_KINDS)}, for an arm that acts along hack directions",
                do="choose another arm, or leave the axes out",
            )
        return replace(self, name=f"{self.name}:{kind}", basis=kind)


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("none", "plain training, axes are only measured"),
        Arm("no-loophole", "the same prompts, but only correct work is paid: the upper bound", exploit_pays=0.0),
        Arm("erase-gradient", "hack-ward part of the gradient removed, before clipping: the default", Gate()),
        Arm("erase-update", "hack-ward part of the optimiser's update removed", Gate(), "update"),
        Arm("erase-gradient-two-sided", "gradient along the axes removed, both ways", Gate("no_gate")),
        Arm("erase-update-two-sided", "exact erasure: no update along the axes at all", Gate("no_gate"), "update"),
        Arm("constant-push", "a constant step away from the hack, whatever the gradient", push=0.6),
        Arm("box", "no net displacement toward the hack, nothing else", box=Box(hackward=0.0)),
        Arm("trusted-complement", "only the gradient along directions of honest work", Gate("keep"), basis=TRUSTED),
        Arm("advantage-modification", "less reward where activations look like the hack sides'", advantage=2.0),
        Arm("ground-truth-penalty", "a perfect detector: exploits cost what correct work earns", exploit_pays=-1.0),
    )
}
"""Every arm by its name."""


def arm_named(name: str) -> Arm:
    """The arm with this name: one of `ARMS`, with a start or a bound as the module says.

    ``:random``, ``:shuffled`` or ``:clean-clean`` behind it stands for other axes.

    Raises:
        UsageError: there is no such arm, or it has no such axes, or a distance is no positive number.
    """
    whole, colon, kind = name.partition(":")
    start, rest = 0.0, whole
    if whole.startswith(_START):
        distance, _, rest = whole.removeprefix(_START).partition("+")
        start = _distance(name, distance)
    base, bounded, away = rest.partition(_AWAY)
    if base not in ARMS:
        raise UsageError(f"arm {name!r}", wanted=", ".join(ARMS), do="choose one of them, perhaps with :random behind")
    arm = replace(ARMS[base], name=whole)
    if start:
        arm = replace(arm, start=start, says=f"from {start:g} away from the hack: {arm.says}")
    if bounded:
        box = Box(hackward=0.0, away=_distance(name, away))
        arm = replace(arm, box=box, says=f"{arm.says}; at most {box.away:g} away from the hack")
    return arm.along(kind) if colon else arm


def _distance(name: str, text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise UsageError(f"arm {name!r}", wanted="a distance such as 0.3", do="give a positive number")
    return found
