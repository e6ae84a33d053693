"""Gradients of single rollouts, taken from the one backward pass of all of them, and what a gate removes from each.

A gate on the sum of all rollouts cannot tell a hack from an honest solution that pulls the other way: they cancel
before it looks. Here it looks at each rollout's own gradient g_b. What it removes, ``Σ_b Vᵀ c_b`` with c_b the gated
coordinates of g_b, is then taken off the summed gradient.

Shapes: M modules of a group, N rollouts, B of them in one backward pass, K axes, R coordinates of δS.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from assay.errors import UsageError
from assay.vhack.delta._frames import Frames, spread
from assay.vhack.delta._gates import Gate
from assay.vhack.delta._product import Kinds
from assay.vhack.delta._sharding import local, local_rows

if TYPE_CHECKING:
    from assay.vhack.delta._delta import DeltaS

__all__ = ["Rollouts", "gate_rollouts"]


class Rollouts:
    """The δS gradient of every rollout of some backward passes, in their order, scaled as they are in the loss.

    Made by :meth:`DeltaS.per_sample`. Their sum is what the same passes have added to the gradient of δS.

    Attributes:
        kinds: set before a forward pass, it leaves one row per kind of samples instead, which is cheaper.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self._parts: list[list[list[Tensor]]] = [[[] for _ in range(count)] for count in counts]
        self.kinds: Kinds | None = None

    def record(self, group: int, module: int, rows_BR: Tensor) -> None:
        """Add the rollouts of one backward pass."""
        self._parts[group][module].append(rows_BR)

    @property
    def rows(self) -> list[Tensor]:
        """Per group, [M, N, R] float32.

        Raises:
            UsageError: there was no backward pass, or not every module took part in it.
        """
        counts = {sum(len(part) for part in parts) for modules in self._parts for parts in modules}
        if len(counts) != 1 or counts == {0}:
            raise UsageError(
                f"gradients of {sorted(counts)} rollouts in different modules",
                wanted="the same in all of them, at least one",
                do="run forward and backward of the whole model inside per_sample()",
            )
        found = []
        for modules in self._parts:
            rows = torch.cat([part for parts in modules for part in parts])  # one operation for all modules
            found.append(rows.view(len(modules), -1, rows.shape[1]))
        return found

    def cin(self, frames: Frames, *, two_sided: bool = False) -> Tensor:
        """The share of each rollout's gradient along the axes, the mean over modules that have any, [N] float64.

        The same as :func:`assay.vhack.cin_over_modules` of these gradients.
        """
        shares = []
        for rows_MNR, axes_MKR, has_M in zip(self.rows, frames.axes, frames.has_axes, strict=True):
            coordinates_MNK = rows_MNR.double() @ axes_MKR.transpose(1, 2)
            kept_MN = (coordinates_MNK if two_sided else coordinates_MNK.relu()).norm(dim=2)
            size_MN = rows_MNR.double().norm(dim=2)
            shares.append((kept_MN / torch.where(size_MN > 0, size_MN, 1.0))[has_M])
        return torch.cat(shares).mean(dim=0)

    def summed(self, chosen_N: Tensor) -> list[Tensor]:
        """Per group the summed gradient of some rollouts, [M, R]: of the student's, or of the teacher's."""
        return [rows_MNR[:, chosen_N.to(rows_MNR.device)].sum(dim=1) for rows_MNR in self.rows]


@torch.no_grad()
def gate_rollouts(
    adapter: "DeltaS",
    rollouts: Rollouts,
    frames: Frames,
    gate: Gate,
    *,
    chosen_N: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Take what the gate removes from each rollout off the summed gradient of the adapter, in place.

    Call it after the backward pass, before a GradScaler has unscaled and before clipping, with an optimiser that does
    not gate the gradient itself.

    Args:
        adapter: its gradients are changed.
        rollouts: of the passes that made these gradients.
        frames: the axes.
        gate: what is removed along them; it may not preserve magnitudes, for those are of the sum, nor be ``keep``.
        chosen_N: which rollouts are gated, [N] bool, for instance those whose `cin` is above a threshold; None is all.
        process_group: where the gradients were averaged over processes, those processes.

    Raises:
        UsageError: the gate preserves magnitudes or is ``keep``, or ``chosen_N`` has another length.
    """
    rows = rollouts.rows
    count = rows[0].shape[1]
    if gate.preserve_magnitude or gate.kind == "keep" or (chosen_N is not None and len(chosen_N) != count):
        chosen = 0 if chosen_N is None else len(chosen_N)
        unfit = gate.preserve_magnitude or gate.kind == "keep"
        raise UsageError(
            f"{gate} for single rollouts" if unfit else f"a choice among {chosen} rollouts",
            wanted=f"a gate that takes something away along the axes, and a choice among {count} rollouts",
            do="gate the sum instead" if unfit else "choose among those of this very step",
        )
    for parameter, rows_MNR, axes_MKR in zip(adapter.delta, rows, frames.axes, strict=True):
        coordinates_MNK = gate.coefficients(rows_MNR.double() @ axes_MKR.transpose(1, 2))
        if chosen_N is not None:
            coordinates_MNK = coordinates_MNK * chosen_N.to(rows_MNR.device)[None, :, None]
        coordinates_MK = coordinates_MNK.sum(dim=1)
        if process_group is not None:
            dist.all_reduce(coordinates_MK, group=process_group)
            coordinates_MK /= dist.get_world_size(process_group)
        if axes_MKR.shape[1] and parameter.grad is not None:
            removed_MR = spread(axes_MKR, coordinates_MK)[local_rows(parameter.grad)]
            gradient_MR = local(parameter.grad)
            gradient_MR.copy_(gradient_MR.double() - removed_MR)
