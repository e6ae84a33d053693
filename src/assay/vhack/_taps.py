"""Reading the δS gradient of every sample off one backward pass of the unmodified model.

With ``y = W x`` replaced by ``(W + U diag(δS) Vh) x`` the gradient at δS = 0 of a loss L is

    g_b = Σ_t (Uᵀ ∂L/∂y_bt) ⊙ (Vh x_bt)

over all tokens t of sample b, prompt tokens too, for attention carries the loss back to them. Samples do not mix in the
forward pass, so one backward of the sum of their losses gives every g_b.

A tap is an identity behind a Linear that keeps what it needs of x and does the sum when ∂L/∂y passes. The sum is done
in one of two orders, whichever has fewer multiplications; they differ in rounding only:

- *project*: ``Vh x`` and ``Uᵀ ∂L/∂y`` per token, 2·T·R·(O + I) operations per sample;
- *outer*: first ``G_b = Σ_t ∂L/∂y_bt x_btᵀ``, then ``diag(Uᵀ G_b Vhᵀ)``, 2·(T + R)·O·I operations. Float32 only:
  in a shorter dtype G would be rounded between the two steps.

Shapes: B samples, T tokens, O outputs, I inputs, R coordinates of δS.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from assay.errors import ModelError
from assay.vhack._svd import Factors

__all__ = ["taps"]

Reduce = Callable[[Tensor, Tensor], None]


class _Tap(torch.autograd.Function):
    """The identity on a Linear's output; its backward hands the gradient, with what was kept of x, to ``reduce``.

    ``trigger`` requires a gradient and never gets one: it makes the backward pass come here although all weights are
    frozen. What is kept goes through autograd, so that gradient checkpointing drops and recomputes it like the rest.
    """

    @staticmethod
    def forward(ctx: Any, output_BTO: Tensor, trigger: Tensor, kept: Tensor, reduce: Reduce) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.reduce = reduce
        return output_BTO.view_as(output_BTO)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        (gradient_BTO,) = gradients
        (kept,) = ctx.saved_tensors
        ctx.reduce(kept, gradient_BTO)
        return gradient_BTO, None, None, None


@contextmanager
def taps(
    modules: Mapping[str, nn.Linear], factors: Mapping[str, Factors], *, checkpointing: bool
) -> Iterator[dict[str, Tensor]]:
    """Tap every module; inside the block each backward pass fills the dictionary with [B, R] float32 per module.

    The hooks are removed at the end of the block, whatever happens in it.

    Args:
        modules: the Linears by name.
        factors: U and Vh of each.
        checkpointing: the forward pass runs twice, so nothing should be computed in it that the first run throws away.
    """
    found: dict[str, Tensor] = {}
    handles = []
    try:
        for name, module in modules.items():
            hook = _hook(name, factors[name], found, checkpointing)
            handles.append(module.register_forward_hook(hook))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    name: str, factors: Factors, found: dict[str, Tensor], checkpointing: bool
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    trigger = torch.zeros((), requires_grad=True)
    # Of x and Vh x the narrower one is kept, unless x is needed whole or Vh x would be computed twice.
    inputs, rank = factors.right.shape[1], factors.rank

    def hook(module: nn.Module, arguments: tuple[Tensor, ...], output_BTO: Tensor) -> Tensor:
        (input_BTI,) = arguments
        if input_BTI.ndim != 3:
            raise ModelError(
                f"{name} is given inputs of shape {list(input_BTI.shape)}",
                wanted="[samples, tokens, width]: tokens that were sent to an expert no longer say whose they are",
                do="use a dense model",
            )
        outer = _outer_is_cheaper(input_BTI, factors)
        early = not outer and not checkpointing and rank < inputs

        def reduce(kept: Tensor, gradient_BTO: Tensor) -> None:
            if outer:
                found[name] = _by_outer(kept, gradient_BTO, factors)
            else:
                coordinates_BTR = kept if early else _coordinates(kept, factors)
                found[name] = _by_projection(coordinates_BTR, gradient_BTO, factors)

        with torch.no_grad():
            kept = _coordinates(input_BTI, factors) if early else input_BTI.detach()
        result: Tensor = _Tap.apply(output_BTO, trigger, kept, reduce)  # type: ignore[no-untyped-call]
        return result

    return hook


def _outer_is_cheaper(input_BTI: Tensor, factors: Factors) -> bool:
    (outputs, rank), inputs, tokens = factors.left.shape, factors.right.shape[1], input_BTI.shape[1]
    is_float32 = input_BTI.dtype == factors.left.dtype == torch.float32
    return is_float32 and (tokens + rank) * outputs * inputs < tokens * rank * (outputs + inputs)


def _coordinates(input_BTI: Tensor, factors: Factors) -> Tensor:
    coordinates_BTR: Tensor = input_BTI.to(factors.right.dtype) @ factors.right.T
    return coordinates_BTR


def _by_projection(coordinates_BTR: Tensor, gradient_BTO: Tensor, factors: Factors) -> Tensor:
    projected_BTR = gradient_BTO.to(factors.left.dtype) @ factors.left
    return (projected_BTR.float() * coordinates_BTR).sum(dim=1)


def _by_outer(input_BTI: Tensor, gradient_BTO: Tensor, factors: Factors) -> Tensor:
    weight_gradient_BOI = gradient_BTO.transpose(1, 2) @ input_BTI
    if factors.left.shape[0] < factors.right.shape[1]:
        return ((weight_gradient_BOI @ factors.right.T) * factors.left).sum(dim=1)
    return ((factors.left.T @ weight_gradient_BOI) * factors.right).sum(dim=2)
