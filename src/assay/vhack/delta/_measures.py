"""What a step did along the axes.

    cin           ‖relu(V g)‖ / ‖g‖ of the gradient before a gate, cout of the one after it
    leak          ‖relu(−V Δ)‖ / ‖Δ‖ of the update Δ that the optimiser made in the end: the honest cout
    displacement  V (δS − δS_0): how far δS went and which way; + is away from the hack

The shares are means over the modules that have axes, two-sided ones have ‖V x‖ instead of ‖relu(V x)‖, and *energy* is
``√(Σ‖relu(V g)‖² / Σ‖g‖²)``, in which small modules do not count as much as large ones.

Everything stays on the device until `Measures.as_dict` asks for numbers: one wait for it per step, or none.

Shapes: M modules of a group, K axes, R coordinates of δS.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from assay.vhack.delta._frames import along

__all__ = ["Measures", "displacement", "share"]

_SHARE = ("", "_two_sided", "_energy")


@dataclass(frozen=True, eq=False)
class Measures:
    """The numbers of one step, as tensors without dimensions, by name."""

    tensors: dict[str, Tensor]

    def as_dict(self) -> dict[str, float]:
        """All numbers, copied from the device at once."""
        values = torch.stack(list(self.tensors.values())).tolist() if self.tensors else []
        return dict(zip(self.tensors, values, strict=True))

    def as_rows(self) -> list[dict[str, float]]:
        """The same of tensors with one dimension: a dictionary for each place."""
        values = torch.stack(list(self.tensors.values()), dim=1).tolist() if self.tensors else []
        return [dict(zip(self.tensors, row, strict=True)) for row in values]


def share(
    name: str,
    vectors: Iterable[tuple[Tensor, Tensor, Tensor]],
    sign: int,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """The shares of gradients (sign 1) or updates (sign −1) along the axes.

    Args:
        name: what the numbers are called; ``_two_sided`` and ``_energy`` are added.
        vectors: per group, vectors [..., M, R], axes [M, K, R] and which modules have axes, [M]. The shares have the
            dimensions before M.
        sign: which way the hack is, see :mod:`assay.vhack.delta._gates`.
        process_group: where the modules are spread over processes, those processes.
    """
    # Sums over modules of: one-sided share, two-sided share, ‖relu(c)‖², ‖x‖², 1.
    sums = []
    for vectors_MR, axes_MKR, has_M in vectors:
        hackward_MK = sign * along(axes_MKR, vectors_MR)
        size_M = vectors_MR.double().norm(dim=-1)
        one_M, two_M = hackward_MK.relu().norm(dim=-1), hackward_MK.norm(dim=-1)
        divisor_M = torch.where(size_M > 0, size_M, 1.0)
        parts_5M = torch.stack([one_M / divisor_M, two_M / divisor_M, one_M**2, size_M**2, torch.ones_like(size_M)])
        sums.append((parts_5M * has_M).sum(dim=-1))
    total = torch.stack(sums).sum(dim=0) if sums else torch.zeros(5, dtype=torch.float64)
    if process_group is not None and sums:
        dist.all_reduce(total, group=process_group)
    one, two, along2, size2, count = total
    energy = (along2 / torch.where(size2 > 0, size2, 1.0)).sqrt()
    values = (one / count.clamp_min(1), two / count.clamp_min(1), energy)
    return {name + suffix: value for suffix, value in zip(_SHARE, values, strict=True)}


def displacement(
    moved: Iterable[tuple[Tensor, Tensor]], process_group: dist.ProcessGroup | None = None
) -> dict[str, Tensor]:
    """Where δS is along the axes: the sum over all of them, the norm, and the farthest hack-ward.

    Args:
        moved: per group, δS − δS_0 [M, R] and axes [M, K, R].
        process_group: as for `share`.
    """
    found = [along(axes_MKR, moved_MR).flatten() for moved_MR, axes_MKR in moved]
    at = torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)
    sums = torch.stack([at.sum(), (at**2).sum()])
    farthest = (-at).amax().clamp_min(0) if at.numel() else sums.new_zeros(())
    if process_group is not None and found:
        dist.all_reduce(sums, group=process_group)
        dist.all_reduce(farthest, op=dist.ReduceOp.MAX, group=process_group)
    return {"displacement": sums[0], "displacement_norm": sums[1].sqrt(), "displacement_hackward": farthest}
