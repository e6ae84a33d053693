"""The δS gradient of every rollout of some backward passes.

Shapes: M modules of a group, N rollouts of all passes, B of one pass, R coordinates of δS, G kinds.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from assay.errors import UsageError


class Rollouts:
    """The δS gradient of every rollout of some backward passes, scaled as in the loss.

    :meth:`DeltaS.per_sample` makes it, given the number of modules per group. Their sum is what
    those passes have added to the gradient of δS.

    Attributes:
        kinds: 1 where a sample is of a kind, [G, B] float32, of which it may be of several; set
            before a forward pass, it keeps one row per kind.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self._parts: list[list[list[Tensor]]] = [[[] for _ in range(count)] for count in counts]
        self.kinds: Tensor | None = None

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
        # One operation for all modules of a group.
        gradients = [
            torch.cat([part for parts in modules for part in parts]) for modules in self._parts
        ]
        return [
            rows.view(len(modules), -1, rows.shape[1])
            for modules, rows in zip(self._parts, gradients, strict=True)
        ]

    def sums(self) -> list[Tensor]:
        """Return the gradient of each kind over all backward passes, [G, M, R] per group."""
        assert self.kinds is not None
        kinds = len(self.kinds)
        by_pass = [rows.view(len(rows), -1, kinds, rows.shape[2]) for rows in self.rows]
        return [rows_MPGR.sum(dim=1).transpose(0, 1).contiguous() for rows_MPGR in by_pass]
