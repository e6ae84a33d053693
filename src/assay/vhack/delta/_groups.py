"""Modules of one shape side by side, so that one batched product serves all of them.

A model of 252 projections has some five shapes. ``W' = W + U diag(δS) Vh`` is then five products instead of 252.

Under FSDP2 a weight is a DTensor whose rows are spread over the processes. Each process merges the rows that it has:
row o of W' needs row o of W and U, and all of δS and Vh, so nothing is sent.

Shapes: M modules of a group, O outputs, I inputs, R coordinates of δS.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from assay.errors import ModelError, UsageError
from assay.vhack.gradients import Factors, is_sharded, local, local_rows, tensor_digest

# Bytes of U diag(δS) that are held at once. More is not faster and would double the memory of large models.
_CHUNK_BYTES = 1 << 28


@dataclass(eq=False)
class Group:
    """The modules of one shape.

    Attributes:
        names: Names of the modules, in the order of the model.
        linears: The modules themselves.
        left: U of each module, [M, O, R].
        right: Vh of each module, [M, R, I].
        values: S of each module, [M, R].
        errors: Residual and orthogonality of each decomposition.
        base: Weights as they were, [M, O, I]; only the rows of this process under FSDP2.
    """

    names: tuple[str, ...]
    linears: tuple[nn.Linear, ...]
    left: Tensor
    right: Tensor
    values: Tensor
    errors: tuple[tuple[float, float], ...]
    base: Tensor
    _rows: slice | None = field(default=None, init=False, repr=False)

    @property
    def rank(self) -> int:
        """Number R of coordinates."""
        return self.left.shape[2]

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are spread over processes, even while they are gathered."""
        return self._rows is not None or is_sharded(self.linears[0].weight)

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 in hex of each whole weight as it was, by name."""
        return {name: tensor_digest(base) for name, base in zip(self.names, self.base, strict=True)}

    def factors(self, index: int) -> Factors:
        """Return the factors of one module, as views."""
        return Factors(self.left[index], self.values[index], self.right[index], *self.errors[index])

    @torch.no_grad()
    def merge(self, delta_MR: Tensor) -> None:
        """Write ``W + U diag(δS) Vh`` into the weights, from the weights as they were.

        The sum is rounded once, so errors of earlier steps do not accumulate. A module whose δS is zero gets its
        weights back bit by bit; adding a zero would lose the sign of a negative zero.
        """
        weights = self._destinations()
        left_MOR = self.left if self._rows is None else self.left[:, self._rows]
        active_M = delta_MR.any(dim=1)
        size = max(1, _CHUNK_BYTES // (self.left[0].numel() * self.left.element_size()))
        for first in range(0, len(self.names), size):
            part = slice(first, first + size)
            merged = _sum(self.base[part], left_MOR[part], delta_MR[part], self.right[part])
            merged = torch.where(active_M[part, None, None], merged, self.base[part])
            torch._foreach_copy_(weights[part], list(merged.unbind()))

    @torch.no_grad()
    def restore(self) -> None:
        """Write the weights as they were."""
        torch._foreach_copy_(self._destinations(), list(self.base.unbind()))

    def _destinations(self) -> list[Tensor]:
        """Return the weights of this process; the first time they are sharded, ``base`` is cut to the same rows."""
        weights: list[Tensor] = [linear.weight for linear in self.linears]
        if not is_sharded(weights[0]):
            return weights
        if self._rows is None:
            _ = self.digests  # of the whole weights
            self._rows = local_rows(weights[0])
            self.base = self.base[:, self._rows].clone()
        return [local(weight) for weight in weights]


def _sum(base_MOI: Tensor, left_MOR: Tensor, delta_MR: Tensor, right_MRI: Tensor) -> Tensor:
    scaled_MOR = (left_MOR * delta_MR[:, None]).to(right_MRI.dtype)
    if base_MOI.dtype == right_MRI.dtype:
        return torch.baddbmm(base_MOI, scaled_MOR, right_MRI)
    return (base_MOI + torch.bmm(scaled_MOR, right_MRI)).to(base_MOI.dtype)


def grouped(modules: Mapping[str, nn.Linear], factors: Mapping[str, Factors]) -> list[Group]:
    """Return groups of modules of one shape, rank, dtype and device, in the order of their first modules.

    Raises:
        UsageError: A module has no factors, or factors of another shape.
        ModelError: The weights are already sharded.
    """
    kinds: dict[tuple[object, ...], list[str]] = {}
    for name, linear in modules.items():
        _check(name, linear, factors)
        kind = (linear.weight.shape, factors[name].rank, linear.weight.dtype, linear.weight.device)
        kinds.setdefault(kind, []).append(name)
    groups = []
    for names in kinds.values():
        linears, each = [modules[name] for name in names], [factors[name] for name in names]
        group = Group(
            tuple(names),
            tuple(linears),
            torch.stack([one.left for one in each]),
            torch.stack([one.right for one in each]),
            torch.stack([one.values for one in each]),
            tuple((one.residual, one.orthogonality) for one in each),
            torch.stack([linear.weight.detach() for linear in linears]),
        )
        groups.append(group)
    return groups


def _check(name: str, linear: nn.Linear, factors: Mapping[str, Factors]) -> None:
    if is_sharded(linear.weight):
        raise ModelError(
            f"{name} is already sharded", wanted="whole weights", do="attach the adapter before fully_shard"
        )
    shape = (factors[name].left.shape[0], factors[name].right.shape[1]) if name in factors else None
    if shape != tuple(linear.weight.shape):
        raise UsageError(
            f"factors of {name} for a matrix {shape}" if shape else f"no factors of {name}",
            wanted=f"factors of its weight, {list(linear.weight.shape)}",
            do="compute them with weight_svd of this very model",
        )
