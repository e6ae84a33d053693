"""Where each sample's rows are in a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Samples end to end: sample b has the rows ``bounds[b][0]`` to ``bounds[b][1]``, and there are no others.

    Attributes:
        bounds: First and last row (exclusive) of each of B samples.
        offsets: Bounds as one tensor on the device, [B + 1] int64.
    """

    bounds: tuple[tuple[int, int], ...]
    offsets: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Segments":
        """Return the segments of samples with so many rows each."""
        ends = [0, *accumulate(lengths)]
        return cls(tuple(pairwise(ends)), torch.tensor(ends).to(device))

    def padding(self) -> tuple[Tensor, Tensor]:
        """Return how to spread the rows out to one length T, and where they are then.

        Returns:
            ``padded``, [B·T], the row at each place, where positions past the end of a sample repeat its first row (any
            valid row would do); and ``real``, [N], the place of each row.
        """
        return self._padding

    @cached_property
    def _padding(self) -> tuple[Tensor, Tensor]:
        starts_B1 = self.offsets[:-1, None]
        lengths_B1 = self.offsets[1:, None] - starts_B1
        longest = max(end - start for start, end in self.bounds)
        at_BT = torch.arange(longest, device=self.offsets.device).expand(len(self.bounds), -1)
        inside_BT = at_BT < lengths_B1
        padded_BT = starts_B1 + torch.where(inside_BT, at_BT, 0)
        return padded_BT.flatten(), inside_BT.flatten().nonzero()[:, 0]
