"""Arms that act on δS along axes: gates, bounds and displaced starts, which failed once an exploit
was sampled (docs/vhack-results.md), and advantage modification.

An axis v points toward the hack *in gradients*: descent on a loss whose gradient lies along +v
learns the hack, because v comes from ∇NLL(hack) − ∇NLL(clean). Descent goes against its gradient,
so an update Δ leads to the hack along −v. The hack-ward coordinates are

    c = V g  of a gradient g      c = −V Δ  of an update Δ      −V (δS − δS_0)  of a displacement

The gates remove γ·relu(c) (``one_sided``) or γ·c (``two_sided``), where the gain γ scales the
counter-force: at 1 they erase, above 1 they push back.

``displaced-A+ARM`` moves δS by A along every axis, away from the hack, before the first step, and
goes on as the arm. ``ARM+away-B`` bounds how far the arm may move away from the hack along each
axis. ``ARM:KIND`` acts along other axes, as a control.

Shapes: M modules of a group, K axes, R coordinates of δS; dimensions before M, one per run for
    instance, are kept.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override

from assay.errors import UsageError
from assay.vhack.directions.basis.basis import Basis
from assay.vhack.directions.basis.extract import PairGradients
from assay.vhack.directions.delta.arms import ARMS as PAYING_ARMS
from assay.vhack.directions.delta.arms import Arm
from assay.vhack.directions.delta.step_measures import along, spread
from assay.vhack.names import DEFAULT_ARM
from assay.vhack.training.trl_internals import intercept_rewards
from assay_research.advantage import HackActivation
from assay_research.control_axes import BASIS_KINDS, make_basis

if TYPE_CHECKING:
    from assay.models.model import Model
    from assay.vhack.pairs.pairs import Pair

GATES = ("none", "one_sided", "two_sided")
"""Rules that say which part of an update along the axes is removed."""

_LEVELS = ("gradient", "update")
_NAME = re.compile(
    r"(displaced-(?P<start>[^+]*)\+)?(?P<arm>[^+:]*)(\+away-(?P<away>[^:]*))?(:(?P<axes>.*))?"
)
_ADDED = "displaced-A+ARM, ARM+away-B"


@dataclass(frozen=True)
class Gate:
    """What is removed along the axes.

    Attributes:
        kind: One of ``GATES``; ``"none"`` only measures.
        gain: Factor γ of what is removed.
    """

    kind: str = "one_sided"
    gain: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in GATES:
            raise UsageError(
                f"gate {self.kind!r}", wanted=", ".join(GATES), do="choose one of them"
            )
        if not (math.isfinite(self.gain) and self.gain >= 0):
            raise UsageError(
                f"a gain of {self.gain}",
                wanted="a number from 0 on",
                do="1 erases, 1.1 pushes back",
            )

    def apply(self, vectors_MR: Tensor, axes_MKR: Tensor, sign: int) -> Tensor:
        """Return vectors without what the gate removes, [..., M, R] float64.

        Args:
            vectors_MR: Gradients or updates, [..., M, R].
            axes_MKR: Axes, [..., M, K, R] float64.
            sign: 1 for gradients, −1 for updates: whether the hack lies along +v or along −v.
        """
        wide_MR = vectors_MR.double()
        if self.kind == "none":
            return wide_MR
        hackward_MK = sign * along(axes_MKR, wide_MR)
        removed_MK = hackward_MK.relu() if self.kind == "one_sided" else hackward_MK
        return wide_MR - sign * spread(axes_MKR, self.gain * removed_MK)


@dataclass(frozen=True)
class Box:
    """Bounds of the displacement along each axis, in units of δS."""

    # 0 allows no net movement toward the hack, but movement away and back.
    hackward: float = 0.0
    away: float = math.inf

    def __post_init__(self) -> None:
        if not (self.hackward >= 0 and self.away >= 0):
            raise UsageError(
                f"{self}",
                wanted="a box around the start, bounds from 0 on",
                do="give lengths, not signs",
            )

    def correction(self, displacement_MR: Tensor, axes_MKR: Tensor) -> Tensor:
        """Return what brings δS back inside, [..., M, R] float64; zero where it is inside."""
        place_MK = along(axes_MKR, displacement_MR)
        return spread(axes_MKR, place_MK.clamp(-self.hackward, self.away) - place_MK)


@dataclass(frozen=True)
class AxisArm(Arm):
    """An arm that acts on δS along axes.

    Attributes:
        gate: Gate that acts along the axes, on the gradient or on the update.
        level: Place where the gate acts: ``"gradient"`` or ``"update"``.
        box: Bounds of the displacement along the axes.
        start: Distance that δS is moved along +v of every axis, away from the hack, before the
            first step.
        advantage: Strength α of advantage modification; 0 turns it off.

    Raises:
        UsageError: The level is unknown.
    """

    gate: Gate = field(default_factory=lambda: Gate("none"))
    level: str = "gradient"
    box: Box | None = None
    start: float = 0.0
    advantage: float = 0.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.level not in _LEVELS:
            raise UsageError(
                f"level={self.level!r}", wanted=" or ".join(_LEVELS), do="choose one of them"
            )

    @property
    @override
    def acts(self) -> bool:
        return self.gate.kind != "none" or self.box is not None or self.start != 0

    @override
    def place(self, delta_MR: Tensor, axes_MKR: Tensor) -> Tensor:
        """Return δS moved along +v of every axis, away from the hack."""
        return (delta_MR.double() + self.start * axes_MKR.sum(dim=-2)).to(delta_MR.dtype)

    @override
    def change_gradient(self, gradient_MR: Tensor, axes_MKR: Tensor) -> Tensor:
        if self.level != "gradient" or self.gate.kind == "none" or not axes_MKR.shape[-2]:
            return gradient_MR
        return self.gate.apply(gradient_MR, axes_MKR, 1).to(gradient_MR.dtype)

    @override
    def change_update(
        self, delta_MR: Tensor, before_MR: Tensor, start_MR: Tensor, axes_MKR: Tensor
    ) -> Tensor:
        """Return δS with the update gated, and then brought back into the box."""
        if not axes_MKR.shape[-2]:
            return delta_MR
        if self.level == "update" and self.gate.kind != "none":
            update_MR = delta_MR.double() - before_MR.double()
            gated_MR = before_MR.double() + self.gate.apply(update_MR, axes_MKR, -1)
            delta_MR = gated_MR.to(delta_MR.dtype)
        if self.box is not None:
            moved_MR = delta_MR.double() - start_MR.double()
            inside_MR = delta_MR.double() + self.box.correction(moved_MR, axes_MKR)
            delta_MR = inside_MR.to(delta_MR.dtype)
        return delta_MR

    @override
    def make_basis(
        self, gradients: PairGradients, *, top_k: int, method: str, seed: int = 0
    ) -> Basis:
        return make_basis(self.basis, gradients, top_k=top_k, method=method, seed=seed)

    @override
    def attach(self, trainer: Any, model: "Model", pairs: "Sequence[Pair]") -> None:
        if self.advantage:
            with trainer.adapter.disabled():
                activation = HackActivation.fit(model, model.tokenizer, pairs)
            intercept_rewards(trainer, partial(activation.pay, trainer, self.advantage))


def _with_axes(arm: Arm) -> AxisArm:
    """Return an arm of the library as one that can act along axes."""
    values: dict[str, Any] = {
        attribute.name: getattr(arm, attribute.name) for attribute in fields(arm)
    }
    return AxisArm(**values)


ARMS: dict[str, AxisArm] = {name: _with_axes(arm) for name, arm in PAYING_ARMS.items()} | {
    arm.name: arm
    for arm in (
        AxisArm(
            "erase-gradient",
            "hack-ward part of the gradient removed, before clipping",
            gate=Gate(),
        ),
        AxisArm(
            "erase-update",
            "hack-ward part of the optimizer's update removed",
            gate=Gate(),
            level="update",
        ),
        AxisArm(
            "erase-gradient-two-sided",
            "gradient along the axes removed, both ways",
            gate=Gate("two_sided"),
        ),
        AxisArm(
            "erase-update-two-sided",
            "exact erasure: no update along the axes at all",
            gate=Gate("two_sided"),
            level="update",
        ),
        AxisArm("box", "no net displacement toward the hack, nothing else", box=Box()),
        AxisArm(
            "advantage-modification",
            "less reward where activations look like the hack sides'",
            advantage=2.0,
        ),
    )
}
"""Every arm by its name, those of the library included."""


def arm_named(name: str, *, gain: float = 1.0) -> AxisArm:
    """Return the arm with a name, which may have a start, a bound and other axes.

    Raises:
        UsageError: There is no such arm, or it has no such axes, or a distance is not a positive
            number.

    >>> arm = arm_named("displaced-0.4+erase-update-two-sided")
    >>> arm.start, arm.gate.kind, arm.level
    (0.4, 'two_sided', 'update')
    """
    form = _NAME.fullmatch(name)
    if form is None or form["arm"] not in ARMS:
        raise _unknown(name)
    base = ARMS[form["arm"]]
    arm = replace(base, name=name.partition(":")[0], gate=replace(base.gate, gain=gain))
    if form["start"] is not None:
        start = _distance(name, form["start"])
        arm = replace(arm, start=start, says=f"from {start:g} away from the hack: {arm.says}")
    if form["away"] is not None:
        box = Box(hackward=0.0, away=_distance(name, form["away"]))
        arm = replace(arm, box=box, says=f"{arm.says}; at most {box.away:g} away from the hack")
    kind = form["axes"]
    if kind in (None, "true"):
        return arm
    if kind not in BASIS_KINDS or not arm.acts:
        raise UsageError(
            f"arm {arm.name} along {kind} axes",
            wanted=f"one of {', '.join(BASIS_KINDS)}, for an arm that acts along hack directions",
            do="choose another arm, or leave the axes out",
        )
    return replace(arm, name=name, basis=kind)


def _unknown(name: str) -> UsageError:
    names = ["displaced-0.4+none", "displaced-0.4+erase-update-two-sided", *ARMS]
    close = get_close_matches(name.partition(":")[0], names, n=1, cutoff=0.4)
    nearest = close[0] if close else DEFAULT_ARM
    kinds = ", ".join(f":{kind}" for kind in BASIS_KINDS[1:])
    return UsageError(
        f"arm {name!r}",
        wanted=f"{', '.join(ARMS)}, {_ADDED}, each perhaps with {kinds}",
        do=f"perhaps --arm {nearest}",
    )


def _distance(name: str, text: str) -> float:
    try:
        distance = float(text)
    except ValueError:
        distance = 0.0
    if not 0 < distance < math.inf:
        raise UsageError(
            f"arm {name!r}",
            wanted=f"{_ADDED} with a positive distance",
            do="give a number, such as displaced-0.4+none",
        )
    return distance
