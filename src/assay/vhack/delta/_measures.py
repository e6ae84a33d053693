"""What a step did along the axes.

    cin           ‖relu(V g)‖ / ‖g‖ of the gradient before a gate, cout of the one after it
    leak          ‖relu(−V Δ)‖ / ‖Δ‖ of the update Δ that the optimizer made in the end: the honest cout
    displacement  V (δS − δS_0): how far δS went and in which direction; + is away from the hack

The shares are means over the modules that have axes. Two-sided shares have ‖V x‖ instead of ‖relu(V x)‖, and *energy*
is ``√(Σ‖relu(V g)‖² / Σ‖g‖²)``, in which small modules do not count as much as large ones.

Everything stays on the device until `Measures.as_dict` asks for numbers: one wait for it per step, or none.

Shapes: M modules of a group, K axes, R coordinates of δS; dimensions before M, one per run for instance, are kept.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from assay.vhack.delta._frames import along

_SHARE = ("", "_two_sided", "_energy")


@dataclass(frozen=True, eq=False)
class Measures:
    """The numbers of one step by name, each a tensor without dimensions or with one, the same for all."""

    tensors: dict[str, Tensor]

    def as_dict(self) -> dict[str, float]:
        """Return the numbers of tensors without dimensions, copied from the device at once."""
        values = torch.stack(list(self.tensors.values())).tolist() if self.tensors else []
        return dict(zip(self.tensors, values, strict=True))

    def as_rows(self) -> list[dict[str, float]]:
        """Return the numbers of tensors with one dimension, a dictionary for each place."""
        values = torch.stack(list(self.tensors.values()), dim=1).tolist() if self.tensors else []
        return [dict(zip(self.tensors, row, strict=True)) for row in values]


def share(
    name: str,
    vectors: Iterable[tuple[Tensor, Tensor, Tensor]],
    sign: int,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """Return the shares of gradients (sign 1) or updates (sign −1) along the axes, by name.

    Args:
        name: Name of the numbers; ``_two_sided`` and ``_energy`` are added to it.
        vectors: Per group, vectors [..., M, R], axes [..., M, K, R] and whether a module has axes, [..., M]. The shares
            have the dimensions before M.
        sign: Direction of the hack along the axes, see :class:`assay.vhack.delta.Gate`.
        process_group: Processes that the modules are spread over, if they are.
    """
    # Sums over modules: one-sided share, two-sided share, ‖relu(c)‖², ‖x‖², 1.
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
    """Return where δS is along the axes: the sum over all of them, the norm, and the farthest toward the hack.

    Args:
        moved: Per group, δS − δS_0 [..., M, R] and axes [..., M, K, R]. The numbers have the dimensions before M.
        process_group: Processes that the modules are spread over, if they are.
    """
    found = [along(axes_MKR, moved_MR).flatten(-2) for moved_MR, axes_MKR in moved]
    at = torch.cat(found, dim=-1) if found else torch.zeros(0, dtype=torch.float64)
    sums = torch.stack([at.sum(dim=-1), (at**2).sum(dim=-1)])
    farthest = (-at).amax(dim=-1).clamp_min(0) if at.shape[-1] else torch.zeros_like(sums[0])
    if process_group is not None and found:
        dist.all_reduce(sums, group=process_group)
        dist.all_reduce(farthest, op=dist.ReduceOp.MAX, group=process_group)
    return {"displacement": sums[0], "displacement_norm": sums[1].sqrt(), "displacement_hackward": farthest}
