"""Gates: what is taken away of a gradient or of an update along the axes.

An axis v points hack-ward *in gradients*: descent on a loss whose gradient lies along +v learns the hack, for v comes
from ∇NLL(hack) − ∇NLL(clean). Descent goes against its gradient, so an update Δ leads to the hack along −v. The
hack-ward coordinates are

    c = V g  of a gradient g        c = −V Δ  of an update Δ        −V (δS − δS_0)  of a displacement

The gates take away γ·relu(c) (``one_sided``), γ·c (``no_gate``, two-sided) or 2γ·c (``reverse``), with the gain γ on
the counter-force: at 1 the first two erase, above 1 they push back. ``keep`` is the complement: with trusted directions
for axes it takes away γ of everything that does not lie along them.

Shapes: M modules of a group, K axes, R coordinates of δS.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.errors import UsageError
from assay.vhack.delta._frames import along, spread

__all__ = ["GATES", "Box", "Gate"]

GATES = ("none", "one_sided", "no_gate", "reverse", "keep")


@dataclass(frozen=True)
class Gate:
    """What is taken away along the axes.

    Attributes:
        kind: ``"one_sided"``, ``"no_gate"``, ``"reverse"``, ``"keep"``, or ``"none"``, which only measures.
        gain: γ.
        preserve_magnitude: what is left of each module's vector is scaled to the length it had.
    """

    kind: str = "one_sided"
    gain: float = 1.0
    preserve_magnitude: bool = False

    def __post_init__(self) -> None:
        if self.kind not in GATES:
            raise UsageError(f"gate {self.kind!r}", wanted=", ".join(GATES), do="choose one of them")
        if not (math.isfinite(self.gain) and self.gain >= 0):
            raise UsageError(f"a gain of {self.gain}", wanted="a number from 0 on", do="1 erases, 1.1 pushes back")

    def coefficients(self, hackward: Tensor) -> Tensor:
        """How much of each hack-ward coordinate is taken away, in its shape; nothing, for ``keep``."""
        if self.kind == "one_sided":
            return self.gain * hackward.relu()
        return {"none": 0.0, "keep": 0.0, "no_gate": 1.0, "reverse": 2.0}[self.kind] * self.gain * hackward

    def apply(self, vectors_MR: Tensor, axes_MKR: Tensor, sign: int) -> Tensor:
        """What is left of vectors, [M, R] float64.

        Args:
            vectors_MR: gradients or updates.
            axes_MKR: the axes, float64.
            sign: 1 for gradients, −1 for updates: along which of +v and −v the hack is.
        """
        wide_MR = vectors_MR.double()
        at_MK = along(axes_MKR, wide_MR)
        left_MR = wide_MR - sign * spread(axes_MKR, self.coefficients(sign * at_MK))
        if self.kind == "keep":
            # A module without axes has nothing to be kept inside of.
            outside_MR = (wide_MR - spread(axes_MKR, at_MK)) * axes_MKR.any(dim=2).any(dim=1)[:, None]
            left_MR = wide_MR - self.gain * outside_MR
        if not self.preserve_magnitude:
            return left_MR
        before_M1, after_M1 = wide_MR.norm(dim=1, keepdim=True), left_MR.norm(dim=1, keepdim=True)
        # Where next to nothing is left there is no direction to scale.
        return left_MR * torch.where(after_M1 > 1e-9 * before_M1, before_M1 / after_M1, 1.0)


@dataclass(frozen=True)
class Box:
    """How far δS may be displaced along each axis, in units of δS: a closed loop, for it looks at where δS is.

    Attributes:
        hackward: how far toward the hack; 0 allows no net movement that way, but movement away and back again.
        away: how far away from it.
    """

    hackward: float = 0.0
    away: float = math.inf

    def __post_init__(self) -> None:
        if not (self.hackward >= 0 and self.away >= 0):
            raise UsageError(f"{self}", wanted="a box around the start, bounds from 0 on", do="give lengths, not signs")

    def correction(self, displacement_MR: Tensor, axes_MKR: Tensor) -> Tensor:
        """What to add to δS so that it is inside again, [M, R] float64, zero where it is."""
        at_MK = along(axes_MKR, displacement_MR)
        return spread(axes_MKR, at_MK.clamp(-self.hackward, self.away) - at_MK)
