"""The product that a module adds, and its gradient with respect to δS.

    y = W x + U diag(δS) Vh x        ∂L/∂δS = Σ_t (Uᵀ ∂L/∂y_t) ⊙ (Vh x_t)

In *hook mode* the second term is computed and added. In *merged mode* it is already in the weights, the output of the
Linear is passed on as it is, and only the gradient is computed here. Its sum is done in one of two orders:

- *project*: Uᵀ ∂L/∂y and Vh x per token, 2·T·R·(O + I) operations for T tokens;
- *outer*: first ``G = Σ_t ∂L/∂y_t x_tᵀ``, the gradient that W would have, then ``diag(Uᵀ G Vhᵀ)``, 2·(T + R)·O·I
  operations. For a square matrix this is less as soon as T > R, and in the limit half.

Gradients of single samples can only be computed by projecting. Where sums over a few kinds of samples are enough, each
kind has its outer sum, if that saves enough: it takes several operations per kind, and a GPU must be sent each of them.

Both are exact; they differ in rounding. What is kept for the backward pass in merged mode is x, which the q, k and v
projections share, and gate and up as well.

Shapes: B samples, T tokens, N = B·T of them, O outputs, I inputs, R coordinates of δS, G kinds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from assay.errors import ModelError
from assay.models.wide import wide_products
from assay.vhack.gradients import delta_gradient, sample_products

# Multiplications that a sum per kind must save; on a GPU, those that it does while the operations are being sent.
_WORTH = {"cuda": 2e10}


@dataclass(frozen=True, eq=False)
class Kinds:
    """Which samples of a batch are of which kind; each sample is of one kind.

    Attributes:
        members: Indices of the samples of each kind, [≤B] int64.
        weights: Membership, [G, B] float32, 1 where a sample is of a kind.
    """

    members: tuple[Tensor, ...]
    weights: Tensor

    @classmethod
    def of(cls, chosen: Sequence[Tensor], device: torch.device) -> "Kinds":
        """Return the kinds given one mask per kind, [B] bool on the CPU."""
        weights_GB = torch.stack(list(chosen)).float()
        return cls(tuple(mask.nonzero()[:, 0].to(device) for mask in chosen), weights_GB.to(device))


@dataclass(frozen=True, eq=False)
class Plan:
    """What the product of one module needs.

    Attributes:
        name: Name of the module.
        left: Matrix U, [O, R].
        right: Matrix Vh, [R, I].
        adds: Whether the product is added to the output, as in hook mode.
        rows: Takes gradients per sample, [B, R], or per kind of samples, [G, R], where they are wanted.
        kinds: Kinds of the samples; None keeps samples apart.
    """

    name: str
    left: Tensor
    right: Tensor
    adds: bool
    rows: Callable[[Tensor], None] | None = None
    kinds: Kinds | None = None


def adapt(output: Tensor, inputs: Tensor, delta_R: Tensor, plan: Plan) -> Tensor:
    """Return the output of a module with its product added (hook mode) or as it is (merged mode).

    Args:
        output: Output of the module, [..., O].
        inputs: Inputs of the module, [..., I].
        delta_R: δS of the module, [R]; its gradient is computed in the backward pass.
        plan: What the product needs.

    Raises:
        ModelError: Gradients of samples are wanted, and the inputs are not [samples, tokens, width].
    """
    if plan.rows is not None and inputs.ndim != 3:
        raise ModelError(
            f"{plan.name} is given inputs of shape {list(inputs.shape)}",
            wanted="[samples, tokens, width] for gradients of single samples",
            do="do not pack samples into one row, or do without per_sample",
        )
    result: Tensor = _Adapted.apply(output, inputs, delta_R, plan)  # type: ignore[no-untyped-call]
    return result


class _Adapted(torch.autograd.Function):
    """`adapt` as a function of autograd."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, delta_R: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        if not plan.adds:
            ctx.save_for_backward(inputs)
            return output.view_as(output)
        ctx.save_for_backward(inputs, delta_R)
        with torch.autocast(output.device.type, enabled=False):
            along = _to(inputs, plan.right) @ plan.right.T
            added = (along * delta_R).to(plan.left.dtype) @ plan.left.T
        # A zero is not added but left out: -0 + 0 would be another zero.
        return torch.where(added == 0, output, (output + added).to(output.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        inputs, *rest = ctx.saved_tensors
        plan: Plan = ctx.plan
        of_output, of_inputs, of_delta, _ = ctx.needs_input_grad
        with torch.autocast(gradient.device.type, enabled=False), wide_products(gradient):
            to_inputs = _of_inputs(gradient, inputs, rest[0], plan) if plan.adds and of_inputs else None
            to_delta = _of_delta(gradient, inputs, plan) if of_delta else None
        return gradient if of_output else None, to_inputs, to_delta, None


def _of_inputs(gradient: Tensor, inputs: Tensor, delta_R: Tensor, plan: Plan) -> Tensor:
    along = (_to(gradient, plan.left) @ plan.left) * delta_R
    return (along.to(plan.right.dtype) @ plan.right).to(inputs.dtype)


def _of_delta(gradient: Tensor, inputs: Tensor, plan: Plan) -> Tensor:
    gradient, inputs = _to(gradient, plan.left), _to(inputs, plan.right)
    if plan.rows is None:
        return _summed(gradient.flatten(0, -2)[None], inputs.flatten(0, -2)[None], plan)[0]
    rows_BR = _summed(gradient, inputs, plan) if plan.kinds is None else _by_kind(gradient, inputs, plan, plan.kinds)
    plan.rows(rows_BR)
    return rows_BR.sum(dim=0)


def _by_kind(gradient_BTO: Tensor, inputs_BTI: Tensor, plan: Plan, kinds: Kinds) -> Tensor:
    """Return the gradient summed over the samples of each kind, [G, R] float32."""
    filled = sum(len(members) > 0 for members in kinds.members)
    saved = _multiplications_saved(inputs_BTI.shape[0] * inputs_BTI.shape[1], filled, plan)
    if saved <= _WORTH.get(gradient_BTO.device.type, 0.0):
        return kinds.weights @ _summed(gradient_BTO, inputs_BTI, plan)
    sums = []
    for members in kinds.members:
        whole = len(members) == len(inputs_BTI)
        theirs, taken = (x if whole else x.index_select(0, members) for x in (gradient_BTO, inputs_BTI))
        sums.append(_summed(theirs.flatten(0, 1)[None], taken.flatten(0, 1)[None], plan)[0])
    return torch.stack(sums)


def _multiplications_saved(tokens: int, sums: int, plan: Plan) -> int:
    """Return how many multiplications fewer the outer order has, for so many tokens in so many sums."""
    (outputs, rank), width = plan.left.shape, plan.right.shape[1]
    return tokens * rank * (outputs + width) - (tokens + sums * rank) * outputs * width


def _summed(gradient_BTO: Tensor, inputs_BTI: Tensor, plan: Plan) -> Tensor:
    """Return Σ_t (Uᵀ g_t) ⊙ (Vh x_t) for every b, [B, R] float32, in the order with fewer multiplications."""
    if _multiplications_saved(inputs_BTI.shape[1], 1, plan) > 0:
        return delta_gradient(gradient_BTO.transpose(1, 2) @ inputs_BTI, plan.left, plan.right)
    return sample_products(gradient_BTO @ plan.left, inputs_BTI @ plan.right.T)


def _to(tensor: Tensor, other: Tensor) -> Tensor:
    return tensor if tensor.dtype == other.dtype else tensor.to(other.dtype)
