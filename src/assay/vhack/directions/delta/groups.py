"""Modules of one shape side by side, so that one batched product serves all of them.

A model of 252 projections has some five shapes. ``W' = W + U diag(δS) Vh`` is then five products
instead of 252.

The product that a module adds, and its gradient with respect to δS::

    y = W x + U diag(δS) Vh x        ∂L/∂δS = Σ_t (Uᵀ ∂L/∂y_t) ⊙ (Vh x_t)

The second term is in the weights, and only the gradient is computed here. Its sum is done in the
cheaper of two orders, which differ in rounding:

- *project*: Uᵀ ∂L/∂y and Vh x per token, 2·T·R·(O + I) operations for T tokens;
- *outer*: first ``G = Σ_t ∂L/∂y_t x_tᵀ``, then ``diag(Uᵀ G Vhᵀ)``, 2·(T + R)·O·I operations.

Gradients of single samples are summed over the samples of a kind afterwards, where only that is
wanted.

Shapes: M modules of a group, B samples (rollouts) of a pass, N of all passes, T tokens, O outputs,
    I inputs, R coordinates of δS, G kinds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from assay.errors import UsageError
from assay.vhack.directions.gradients.svd import Factors, factors_of
from assay.vhack.directions.gradients.taps import delta_gradient
from assay.vhack.directions.gradients.targets import tensor_digest

# Bytes of U diag(δS) that are held at once. More is not faster and would double the memory of large
# models.
_CHUNK_BYTES = 1 << 28


@dataclass(eq=False)
class ModuleGroup:
    """The modules of one shape."""

    names: tuple[str, ...]  # in the order of the model
    linears: tuple[nn.Linear, ...]
    left: Tensor  # U of each module, [M, O, R]
    right: Tensor  # Vh of each module, [M, R, I]
    factors: tuple[Factors, ...]  # of each module, with views of these U and Vh
    base: Tensor  # weights as they were, [M, O, I]

    @property
    def rank(self) -> int:
        """Number R of coordinates."""
        return self.left.shape[2]

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 in hex of each whole weight as it was, by name."""
        return {name: tensor_digest(base) for name, base in zip(self.names, self.base, strict=True)}

    @torch.no_grad()
    def merge(self, delta_MR: Tensor) -> None:
        """Write ``W + U diag(δS) Vh`` into the weights, from the weights as they were.

        The sum is rounded once, so errors of earlier steps do not accumulate. A module whose δS is
        zero gets its weights back bit by bit; adding a zero would lose the sign of a negative zero.
        """
        weights: list[Tensor] = [linear.weight for linear in self.linears]
        active_M = delta_MR.any(dim=1)
        size = max(1, _CHUNK_BYTES // (self.left[0].numel() * self.left.element_size()))
        for first in range(0, len(self.names), size):
            part = slice(first, first + size)
            base_MOI = self.base[part]
            right_MRI = self.right[part]
            scaled_MOR = (self.left[part] * delta_MR[part, None]).to(right_MRI.dtype)
            if base_MOI.dtype == right_MRI.dtype:
                merged = torch.baddbmm(base_MOI, scaled_MOR, right_MRI)
            else:
                merged = (base_MOI + torch.bmm(scaled_MOR, right_MRI)).to(base_MOI.dtype)
            merged = torch.where(active_M[part, None, None], merged, base_MOI)
            torch._foreach_copy_(weights[part], list(merged.unbind()))

    @torch.no_grad()
    def restore(self) -> None:
        """Write the weights as they were."""
        torch._foreach_copy_([linear.weight for linear in self.linears], list(self.base.unbind()))


def group_modules(
    modules: Mapping[str, nn.Linear], factors: Mapping[str, Factors]
) -> list[ModuleGroup]:
    """Return groups of modules of one shape, rank and dtype, in the order of their first modules.

    Raises:
        UsageError: A module has no factors, or factors of another shape.
    """
    factors_of_modules = factors_of(modules, factors)
    kinds: dict[tuple[object, ...], list[str]] = {}
    for name, linear in modules.items():
        kinds.setdefault(
            (linear.weight.shape, factors_of_modules[name].rank, linear.weight.dtype), []
        ).append(name)
    groups = []
    for names in kinds.values():
        linears = [modules[name] for name in names]
        group_factors = [factors_of_modules[name] for name in names]
        left = torch.stack([each.left for each in group_factors])
        right = torch.stack([each.right for each in group_factors])
        views = tuple(
            replace(each, left=left[index], right=right[index])
            for index, each in enumerate(group_factors)
        )
        base = torch.stack([linear.weight.detach() for linear in linears])
        groups.append(ModuleGroup(tuple(names), tuple(linears), left, right, views, base))
    return groups


def gradient_of_delta(
    factors: Factors, record: Callable[[Tensor], None] | None, inputs: Tensor, gradient: Tensor
) -> Tensor:
    """Return the gradient of the δS of a module, [R], from its inputs and that of its output.

    ``record`` takes the gradients of single samples, [B, R], where they are wanted; inputs are then
    [samples, tokens, width].
    """
    gradient = gradient.to(factors.left.dtype)
    inputs = inputs.to(factors.right.dtype)
    if record is None:
        return _sum_products(gradient.flatten(0, -2)[None], inputs.flatten(0, -2)[None], factors)[0]
    rows_BR = _sum_products(gradient, inputs, factors)
    record(rows_BR)
    return rows_BR.sum(dim=0)


def _sum_products(gradient_BTO: Tensor, inputs_BTI: Tensor, factors: Factors) -> Tensor:
    """Return Σ_t (Uᵀ g_t) ⊙ (Vh x_t) per sample, [B, R] float32, in the cheaper order."""
    (outputs, rank), (tokens, width) = factors.left.shape, inputs_BTI.shape[1:]
    if tokens * rank * (outputs + width) > (tokens + rank) * outputs * width:
        weight_gradients = gradient_BTO.transpose(1, 2) @ inputs_BTI
        return delta_gradient(weight_gradients, factors.left, factors.right)
    return ((gradient_BTO @ factors.left).float() * (inputs_BTI @ factors.right.T)).sum(dim=1)


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

    def record(self, group: int, module: int, kinds_GB: Tensor | None, rows_BR: Tensor) -> None:
        """Add the rollouts of one backward pass, or sums over those of each kind."""
        self._parts[group][module].append(rows_BR if kinds_GB is None else kinds_GB @ rows_BR)

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
        by_pass = [rows.view(len(rows), -1, len(self.kinds), rows.shape[2]) for rows in self.rows]
        return [rows_MPGR.sum(dim=1).transpose(0, 1).contiguous() for rows_MPGR in by_pass]
