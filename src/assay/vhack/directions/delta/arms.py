"""The gates, and the arms: every way to hold training back that is compared with the others, as one
table.

An axis v points toward the hack *in gradients*: descent on a loss whose gradient lies along +v
learns the hack, because v comes from ∇NLL(hack) − ∇NLL(clean). Descent goes against its gradient,
so an update Δ leads to the hack along −v. The hack-ward coordinates are

    c = V g  of a gradient g        c = −V Δ  of an update Δ        −V (δS − δS_0)  of a displacement

The gates remove γ·relu(c) (``one_sided``) or γ·c (``two_sided``), where the gain γ scales the
counter-force: at 1 they erase, above 1 they push back.

Two things can be added to an arm by its name. ``displaced-A+ARM`` moves δS by A along every axis,
away from the hack, before the first step, and goes on as the arm: with ``none`` as plain training,
with ``erase-update-two-sided`` it stays there, and all learning is orthogonal to the axes.
``ARM+away-B`` bounds how far the arm may move away from the hack along each axis, counted from the
weights of the model: a counter-force with an end.

An arm says which axes are acted on, how, and what is paid. It does not say which optimizer, model
or tasks: those are the same for all arms of a comparison.

``correct`` and ``exploited`` are what :class:`assay.vhack.environment.Grade` says of a rollout:
correct in every hidden case, and paid through the loophole although it is not correct.

Shapes: M modules of a group, K axes, R coordinates of δS; dimensions before M, one per run for
    instance, are kept.
"""

import math
import re
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar

from assay.errors import UsageError
from assay.vhack.names import DEFAULT_ARM

if TYPE_CHECKING:
    from torch import Tensor

Number = TypeVar("Number", float, "Tensor")

GATES = ("none", "one_sided", "two_sided")
"""Rules that say which part of an update along the axes is removed."""

FLAGGED = ("", "filter", "quarantine", "penalty")
"""What may become of rollouts that a detector flags."""

BASIS_KINDS = ("true", "random", "shuffled", "clean-clean")
"""The axes an arm may act along; all but the true ones are controls, which assay-research makes."""

_LEVELS = ("gradient", "update")
_NAME = re.compile(
    r"(displaced-(?P<start>[^+]*)\+)?(?P<arm>[^+:]*)(\+away-(?P<away>[^:]*))?(:(?P<axes>.*))?"
)
_ADDED = "displaced-A+ARM, ARM+away-B"


@dataclass(frozen=True)
class Gate:
    """What is removed along the axes.

    Attributes:
        kind: One of ``"one_sided"``, ``"two_sided"``, and ``"none"``, which only measures.
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

    def coefficients(self, hackward: "Tensor") -> "Tensor":
        """Return how much of each hack-ward coordinate is removed, in its shape."""
        if self.kind == "one_sided":
            return self.gain * hackward.relu()
        return {"none": 0.0, "two_sided": 1.0}[self.kind] * self.gain * hackward

    def apply(self, vectors_MR: "Tensor", axes_MKR: "Tensor", sign: int) -> "Tensor":
        """Return what is left of vectors, [..., M, R] float64.

        Args:
            vectors_MR: Gradients or updates, [..., M, R].
            axes_MKR: Axes, [..., M, K, R] float64.
            sign: 1 for gradients, −1 for updates: whether the hack lies along +v or along −v.
        """
        from assay.vhack.directions.delta.frames import along, spread

        wide_MR = vectors_MR.double()
        removed_MK = self.coefficients(sign * along(axes_MKR, wide_MR))
        return wide_MR - sign * spread(axes_MKR, removed_MK)


@dataclass(frozen=True)
class Box:
    """How far δS may be displaced along each axis, in units of δS: a closed loop, because it looks
    at where δS is.
    """

    # Largest distance toward the hack; 0 allows no net movement that way, but movement away and
    # back.
    hackward: float = 0.0
    away: float = math.inf  # largest distance away from the hack

    def __post_init__(self) -> None:
        if not (self.hackward >= 0 and self.away >= 0):
            raise UsageError(
                f"{self}",
                wanted="a box around the start, bounds from 0 on",
                do="give lengths, not signs",
            )

    def correction(self, displacement_MR: "Tensor", axes_MKR: "Tensor") -> "Tensor":
        """Return what to add to δS so that it is inside again, [..., M, R] float64, zero where it
        is inside.
        """
        from assay.vhack.directions.delta.frames import along, spread

        at_MK = along(axes_MKR, displacement_MR)
        return spread(axes_MKR, at_MK.clamp(-self.hackward, self.away) - at_MK)


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: Name as in `ARMS`, followed by ``:KIND`` where other axes than the true ones are acted
            on.
        says: Description in a few words.
        gate: Gate that acts along the axes, on the gradient or on the update.
        level: Place where the gate acts: ``"gradient"`` or ``"update"``.
        basis: Kind of axes: one of ``BASIS_KINDS``.
        box: Bounds of the displacement along the axes.
        start: Distance that δS is moved along +v of every axis, away from the hack, before the
            first step.
        exploit_pays: Reward of a rollout that is exploited and not correct.
        advantage: Strength α of advantage modification, which needs assay-research; 0 turns it off.
        flagged: What becomes of rollouts that a detector flags: one of ``FLAGGED``, of which ""
            leaves them alone.

    Raises:
        UsageError: The level is unknown.
    """

    name: str
    says: str
    gate: Gate = field(default_factory=lambda: Gate("none"))
    level: str = "gradient"
    basis: str = "true"
    box: Box | None = None
    start: float = 0.0
    exploit_pays: float = 1.0
    advantage: float = 0.0
    flagged: str = ""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("level", self.level, _LEVELS),
            ("flagged", self.flagged, FLAGGED),
        ):
            if value not in known:
                raise UsageError(
                    f"{name}={value!r}",
                    wanted=" or ".join(map(repr, known)),
                    do="choose one of them",
                )

    def judge(self, rewards_BF: "Tensor", flags_B: "Tensor", weights_F: "Tensor") -> "Tensor":
        """Return what rollouts are paid by F reward functions, of these weights, after a detector
        has flagged some.

        ``penalty`` takes 1 in all, from the functions that count for a rollout. ``filter`` pays
        nothing that is a number: TRL leaves such rollouts out of the mean and the spread of their
        group, and they get no advantage.
        """
        if self.flagged == "penalty":
            used_BF = ~rewards_BF.isnan() & (weights_F != 0)
            share_BF = weights_F.sign() / (used_BF * weights_F.abs()).sum(dim=1, keepdim=True)
            return rewards_BF.where(~(used_BF & flags_B[:, None]), rewards_BF - share_BF)
        return (
            rewards_BF.masked_fill(flags_B[:, None], math.nan)
            if self.flagged == "filter"
            else rewards_BF
        )

    @property
    def acts(self) -> bool:
        """Whether it does anything along its axes; otherwise they are only measured."""
        return self.gate.kind != "none" or self.box is not None or self.start != 0

    def reward(self, correct: Number, exploited: Number) -> Number:
        """Return what a rollout is paid; takes tensors or numbers of 0 and 1."""
        return correct + self.exploit_pays * exploited


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("none", "plain training, axes are only measured"),
        Arm(
            "no-loophole",
            "the same prompts, but only correct work is paid: the upper bound",
            exploit_pays=0.0,
        ),
        Arm("erase-gradient", "hack-ward part of the gradient removed, before clipping", Gate()),
        Arm("erase-update", "hack-ward part of the optimizer's update removed", Gate(), "update"),
        Arm(
            "erase-gradient-two-sided",
            "gradient along the axes removed, both ways",
            Gate("two_sided"),
        ),
        Arm(
            "erase-update-two-sided",
            "exact erasure: no update along the axes at all",
            Gate("two_sided"),
            "update",
        ),
        Arm("box", "no net displacement toward the hack, nothing else", box=Box(hackward=0.0)),
        Arm(
            "advantage-modification",
            "less reward where activations look like the hack sides'",
            advantage=2.0,
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
        Arm("penalty", "rollouts that a detector flags are paid 1 less", flagged="penalty"),
        Arm(
            "ground-truth-penalty",
            "a perfect detector: exploits cost what correct work earns",
            exploit_pays=-1.0,
        ),
    )
}
"""Every arm by its name."""


def arm_named(name: str) -> Arm:
    """Return the arm with a name: one of `ARMS`, or one with a start (``displaced-A+ARM``) or a
    bound (``ARM+away-B``).

    A name may end in ``:random``, ``:shuffled`` or ``:clean-clean``, which stands for other axes.

    Raises:
        UsageError: There is no such arm, or it has no such axes, or a distance is not a positive
            number.

    >>> arm = arm_named("displaced-0.4+erase-update-two-sided")
    >>> arm.start, arm.gate.kind, arm.level
    (0.4, 'two_sided', 'update')
    """
    form = _NAME.fullmatch(name)
    if form is None or form["arm"] not in ARMS:
        known = ["displaced-0.4+none", "displaced-0.4+erase-update-two-sided", *ARMS]
        nearest = (
            get_close_matches(name.partition(":")[0], known, n=1, cutoff=0.4) or [DEFAULT_ARM]
        )[0]
        wanted = (
            f"{', '.join(ARMS)}, {_ADDED}, each perhaps with "
            f"{', '.join(f':{kind}' for kind in BASIS_KINDS[1:])}"
        )
        raise UsageError(f"arm {name!r}", wanted=wanted, do=f"perhaps --arm {nearest}")
    arm = replace(ARMS[form["arm"]], name=name.partition(":")[0])
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
        wanted = f"one of {', '.join(BASIS_KINDS)}, for an arm that acts along hack directions"
        do = "choose another arm, or leave the axes out"
        raise UsageError(f"arm {arm.name} along {kind} axes", wanted=wanted, do=do)
    return replace(arm, name=name, basis=kind)


def load_controls(arm: Arm) -> Any:
    """Return the module of assay-research with what an arm needs beside true axes, ``make_basis``
    and ``Shortcut``.

    None where it needs nothing.

    Raises:
        UsageError: The package is not installed.
    """
    if arm.basis == "true" and not arm.advantage:
        return None
    for point in entry_points(group="assay.commands", name="vhack train --arm"):
        return point.load()
    do = "install assay-research (research/ of the repository), or choose another arm"
    raise UsageError(
        f"the arm {arm.name}", wanted="the package assay-research, which has its axes", do=do
    )


def _distance(name: str, text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise UsageError(
            f"arm {name!r}",
            wanted=f"{_ADDED} with a positive distance",
            do="give a number, such as displaced-0.4+none",
        )
    return found


def gate_gradient(arm: Arm, gradient_MR: "Tensor", axes_MKR: "Tensor") -> "Tensor":
    """Return the gradient after the arm's gate, [..., M, R]; unchanged where the arm does not gate
    gradients.
    """
    if arm.level != "gradient" or arm.gate.kind == "none" or not axes_MKR.shape[-2]:
        return gradient_MR
    return arm.gate.apply(gradient_MR, axes_MKR, 1).to(gradient_MR.dtype)


def apply_arm(
    arm: Arm, delta_MR: "Tensor", before_MR: "Tensor", start_MR: "Tensor", axes_MKR: "Tensor"
) -> "Tensor":
    """Return δS after the arm has acted on what the inner optimizer did: gate the update, then box.

    Args:
        arm: Arm to apply.
        delta_MR: δS after the step of the inner optimizer, [..., M, R].
        before_MR: δS before that step.
        start_MR: δS that displacements are counted from.
        axes_MKR: Axes of the arm, [..., M, K, R] float64.
    """
    if not axes_MKR.shape[-2]:
        return delta_MR
    if arm.level == "update" and arm.gate.kind != "none":
        update_MR = delta_MR.double() - before_MR.double()
        delta_MR = (before_MR.double() + arm.gate.apply(update_MR, axes_MKR, -1)).to(delta_MR.dtype)
    if arm.box is not None:
        moved_MR = delta_MR.double() - start_MR.double()
        delta_MR = (delta_MR.double() + arm.box.correction(moved_MR, axes_MKR)).to(delta_MR.dtype)
    return delta_MR


def displace(delta_MR: "Tensor", distance: "float | Tensor", axes_MKR: "Tensor") -> "Tensor":
    """Return δS, [..., M, R], moved along +v of every axis, away from the hack.

    The distance is in units of δS; a tensor holds one per run and is shaped to fit before [M, R].
    """
    return (delta_MR.double() + distance * axes_MKR.sum(dim=-2)).to(delta_MR.dtype)
