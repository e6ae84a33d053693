"""What a step did along the axes.

    cin           ‖relu(V g)‖ / ‖g‖ of the gradient before a gate, cout of the one after it
    leak          ‖relu(−V Δ)‖ / ‖Δ‖ of the update Δ that the optimizer made: the honest cout
    displacement  V (δS − δS_0): how far δS went and in which direction; + is away from the hack

The shares are means over the modules that have axes. Two-sided shares have ‖V x‖ instead of
‖relu(V x)‖.

Shapes: M modules of a group, K axes, R coordinates of δS; dimensions before M, such as one per run,
    are kept.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.vhack.directions.delta.stacked_axes import along

_SHARE = ("", "_two_sided")


@dataclass(frozen=True, eq=False)
class StepMeasures:
    """The numbers of one step by name, as scalar tensors that stay on their device."""

    tensors: dict[str, Tensor]

    def as_dict(self) -> dict[str, float]:
        """Return the numbers, copied from the device at once: one wait for it per step, or none."""
        values = torch.stack(list(self.tensors.values())).tolist() if self.tensors else []
        return dict(zip(self.tensors, values, strict=True))


def measure_shares(
    name: str, vectors: Iterable[tuple[Tensor, Tensor, Tensor]], sign: int
) -> dict[str, Tensor]:
    """Return one- and two-sided shares of gradients (sign 1) or updates (−1) along the axes.

    Each group gives vectors [..., M, R], axes [..., M, K, R] and whether a module has axes, [...,
    M]; shares have the dimensions before M.
    """
    # Sums over modules: one-sided share, two-sided share, 1.
    sums = []
    for vectors_MR, axes_MKR, has_M in vectors:
        hackward_MK = sign * along(axes_MKR, vectors_MR)
        size_M = vectors_MR.double().norm(dim=-1)
        one_M = hackward_MK.relu().norm(dim=-1)
        two_M = hackward_MK.norm(dim=-1)
        divisor_M = torch.where(size_M > 0, size_M, 1.0)
        parts_3M = torch.stack([one_M / divisor_M, two_M / divisor_M, torch.ones_like(size_M)])
        sums.append((parts_3M * has_M).sum(dim=-1))
    total = torch.stack(sums).sum(dim=0) if sums else torch.zeros(3, dtype=torch.float64)
    *shares, count = total
    return {
        name + suffix: share / count.clamp_min(1)
        for suffix, share in zip(_SHARE, shares, strict=True)
    }


def measure_displacement(moved: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return sum, norm and farthest hack-ward place of δS along the axes.

    Each group gives δS − δS_0 [..., M, R] and axes [..., M, K, R]; the numbers have the dimensions
    before M.
    """
    coordinates = [along(axes_MKR, moved_MR).flatten(-2) for moved_MR, axes_MKR in moved]
    coordinates_MK = (
        torch.cat(coordinates, dim=-1) if coordinates else torch.zeros(0, dtype=torch.float64)
    )
    sums = torch.stack([coordinates_MK.sum(dim=-1), (coordinates_MK**2).sum(dim=-1)])
    farthest = (
        (-coordinates_MK).amax(dim=-1).clamp_min(0)
        if coordinates_MK.shape[-1]
        else torch.zeros_like(sums[0])
    )
    return {
        "displacement": sums[0],
        "displacement_norm": sums[1].sqrt(),
        "displacement_hackward": farthest,
    }
