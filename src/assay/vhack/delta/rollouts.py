"""Gradients of single rollouts, taken from the one backward pass of all of them.

A gate on the sum of all rollouts cannot tell a hack from an honest solution that pulls the other way: they cancel
before it looks. With the gradients of single rollouts it can look at each.

Shapes: M modules of a group, N rollouts, B of them in one backward pass, K axes, R coordinates of δS.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from assay.errors import UsageError
from assay.vhack.delta.frames import Frames, share
from assay.vhack.delta.groups import Kinds


class Rollouts:
    """The δS gradient of every rollout of some backward passes, in their order, scaled as they are in the loss.

    :meth:`DeltaS.per_sample` makes it. Their sum is what those passes have added to the gradient of δS.

    Args:
        counts: Number of modules per group.

    Attributes:
        kinds: Kinds of samples; set before a forward pass, it keeps one row per kind instead, which is cheaper.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self._parts: list[list[list[Tensor]]] = [[[] for _ in range(count)] for count in counts]
        self.kinds: Kinds | None = None

    def record(self, group: int, module: int, rows_BR: Tensor) -> None:
        """Add the rollouts of one backward pass."""
        self._parts[group][module].append(rows_BR)

    @property
    def rows(self) -> list[Tensor]:
        """Gradients per group, [M, N, R] float32.

        Raises:
            UsageError: There was no backward pass, or not every module took part in it.
        """
        counts = {sum(len(part) for part in parts) for modules in self._parts for parts in modules}
        if len(counts) != 1 or counts == {0}:
            raise UsageError(
                f"gradients of {sorted(counts)} rollouts in different modules",
                wanted="one number of rollouts for all of them, at least 1",
                do="run forward and backward of the whole model inside per_sample()",
            )
        found = []
        for modules in self._parts:
            rows = torch.cat([part for parts in modules for part in parts])  # one operation for all modules
            found.append(rows.view(len(modules), -1, rows.shape[1]))
        return found

    def cin(self, frames: Frames, *, two_sided: bool = False) -> Tensor:
        """Return the share of each rollout's gradient along the axes, the mean over modules that have any, [N] float64.

        :func:`assay.vhack.cin_over_modules` defines it.

        Args:
            frames: Axes.
            two_sided: Whether ‖V g‖ is counted instead of ‖relu(V g)‖.
        """
        vectors = (rows_MNR.transpose(0, 1) for rows_MNR in self.rows)
        shares = share("cin", zip(vectors, frames.axes, frames.has_axes, strict=True), 1)
        return shares["cin_two_sided" if two_sided else "cin"]
