"""Gates: what is removed from a gradient or from an update along the axes.

An axis v points toward the hack *in gradients*: descent on a loss whose gradient lies along +v learns the hack, because
v comes from ∇NLL(hack) − ∇NLL(clean). Descent goes against its gradient, so an update Δ leads to the hack along −v. The
hack-ward coordinates are

    c = V g  of a gradient g        c = −V Δ  of an update Δ        −V (δS − δS_0)  of a displacement

The gates remove γ·relu(c) (``one_sided``), γ·c (``two_sided``) or 2γ·c (``reverse``), where the gain γ scales the
counter-force: at 1 the first two erase, above 1 they push back. ``keep`` is the complement: with trusted directions as
axes it removes γ of everything that does not lie along them.

Shapes: M modules of a group, K axes, R coordinates of δS; dimensions before M, one per run for instance, are kept.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.errors import UsageError
from assay.vhack.delta._frames import along, spread

GATES = ("none", "one_sided", "two_sided", "reverse", "keep")
_OLD_WORDS = {"no_gate": "two_sided"}  # of the first version


@dataclass(frozen=True)
class Gate:
    """What is removed along the axes.

    Attributes:
        kind: One of ``"one_sided"``, ``"two_sided"``, ``"reverse"``, ``"keep"``, and ``"none"``, which only measures.
            ``"no_gate"``, the first version's word for ``"two_sided"``, is still read.
        gain: Factor γ of what is removed.
        preserve_magnitude: Whether what is left of each module's vector is scaled to the length that it had.
    """

    kind: str = "one_sided"
    gain: float = 1.0
    preserve_magnitude: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", _OLD_WORDS.get(self.kind, self.kind))
        if self.kind not in GATES:
            raise UsageError(f"gate {self.kind!r}", wanted=", ".join(GATES), do="choose one of them")
        if not (math.isfinite(self.gain) and self.gain >= 0):
            raise UsageError(f"a gain of {self.gain}", wanted="a number from 0 on", do="1 erases, 1.1 pushes back")

    def coefficients(self, hackward: Tensor) -> Tensor:
        """Return how much of each hack-ward coordinate is removed, in its shape; zeros for ``keep``."""
        if self.kind == "one_sided":
            return self.gain * hackward.relu()
        return {"none": 0.0, "keep": 0.0, "two_sided": 1.0, "reverse": 2.0}[self.kind] * self.gain * hackward

    def apply(self, vectors_MR: Tensor, axes_MKR: Tensor, sign: int) -> Tensor:
        """Return what is left of vectors, [..., M, R] float64.

        Args:
            vectors_MR: Gradients or updates, [..., M, R].
            axes_MKR: Axes, [..., M, K, R] float64.
            sign: 1 for gradients, −1 for updates: whether the hack lies along +v or along −v.
        """
        wide_MR = vectors_MR.double()
        at_MK = along(axes_MKR, wide_MR)
        left_MR = wide_MR - sign * spread(axes_MKR, self.coefficients(sign * at_MK))
        if self.kind == "keep":
            # A module without axes has nothing that could be kept, and is left alone.
            outside_MR = (wide_MR - spread(axes_MKR, at_MK)) * axes_MKR.any(dim=-1).any(dim=-1)[..., None]
            left_MR = wide_MR - self.gain * outside_MR
        if not self.preserve_magnitude:
            return left_MR
        before_M1, after_M1 = wide_MR.norm(dim=-1, keepdim=True), left_MR.norm(dim=-1, keepdim=True)
        # Where almost nothing is left there is no direction to scale.
        return left_MR * torch.where(after_M1 > 1e-9 * before_M1, before_M1 / after_M1, 1.0)


@dataclass(frozen=True)
class Box:
    """How far δS may be displaced along each axis, in units of δS: a closed loop, because it looks at where δS is.

    Attributes:
        hackward: Largest distance toward the hack; 0 allows no net movement that way, but movement away and back.
        away: Largest distance away from the hack.
    """

    hackward: float = 0.0
    away: float = math.inf

    def __post_init__(self) -> None:
        if not (self.hackward >= 0 and self.away >= 0):
            raise UsageError(f"{self}", wanted="a box around the start, bounds from 0 on", do="give lengths, not signs")

    def correction(self, displacement_MR: Tensor, axes_MKR: Tensor) -> Tensor:
        """Return what to add to δS so that it is inside again, [..., M, R] float64, zero where it is inside."""
        at_MK = along(axes_MKR, displacement_MR)
        return spread(axes_MKR, at_MK.clamp(-self.hackward, self.away) - at_MK)
