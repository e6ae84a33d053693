"""Linears whose backward pass leaves the δS gradient of every sample.

With ``y = W x`` replaced by ``(W + U diag(δS) Vh) x`` the gradient at δS = 0 of a loss L is

    g_b = Σ_t (Uᵀ ∂L/∂y_bt) ⊙ (Vh x_bt)

over all tokens t of sample b, prompt tokens too, for attention carries the loss back to them.
Samples do not mix in the forward pass, so one backward pass of the sum of their losses gives every
g_b.

The sum is done in one of several ways that differ in rounding only. With G_b = Σ_t ∂L/∂y_bt x_btᵀ,
the gradient of W:

- *project*: ``c = Vh x`` and ``p = Uᵀ ∂L/∂y`` per token, then the sum over tokens of their product;
  in any dtype;
- *right*: ``p`` only, then the diagonal of ``(Σ_t p xᵀ) Vhᵀ``;
- *left*: ``c`` only, then the diagonal of ``Uᵀ (Σ_t ∂L/∂y cᵀ)``;
- *outer*: G_b itself, then the diagonal of ``Uᵀ G_b Vhᵀ``.

All but the first keep a sum over tokens in a matrix before it is projected, so they are for float32
only, and take a few large products per sample, which suits a CPU.

``W = U S Vh`` gives some products for less. Where W has more rows than columns, ``Wᵀ ∂L/∂y = Vhᵀ S
p`` costs the smaller side squared once p is known; where it has more columns, so does ``W x = U S
c``. This is as exact as the factors.

On one CPU thread the gradients of the bundled model Qwen3 take 1.21 times as long if every tap
projects, 1.14 without products by factors and 1.05 without *outer*
(research/results/vhack_ways_cpu.json, where a fifth way saved 1.04). A GPU only projects, in
Qwen3-4B in 0.58 s.

Shapes: N rows (tokens of all samples), B samples, O outputs, I inputs, R coordinates of δS.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from assay.errors import ModelError
from assay.models.precision import own_precision, wide_products
from assay.vhack.directions.gradients.batches import Segments
from assay.vhack.directions.gradients.gradient_operations import segment_products
from assay.vhack.directions.gradients.svd import Factors

_FITS = 1e-5


def delta_gradient(weight_gradient: Tensor, left_OR: Tensor, right_RI: Tensor) -> Tensor:
    """Return the δS gradient ``diag(Uᵀ G Vhᵀ)``, [..., R] float32, of weight gradients G.

    The longer side is projected first, which leaves less to multiply.
    """
    if left_OR.shape[0] < right_RI.shape[1]:
        return ((weight_gradient @ right_RI.T).float() * left_OR).sum(dim=-2)
    return ((left_OR.T @ weight_gradient).float() * right_RI).sum(dim=-1)


@dataclass(frozen=True)
class TapPlan:
    """How a tap computes its output and the sum over tokens."""

    order: str  # "project", "right", "left" or "outer"
    early: bool  # Vh x is computed in the forward pass and kept, and x is not
    output: bool  # W x comes from the factors
    input: bool  # Wᵀ ∂L/∂y comes from the factors


@dataclass(eq=False)
class Tap:
    """What replaces the forward function of a Linear.

    A Linear with a forward function of its own keeps it, and the tap stands after it. One that a
    pass calls several times leaves the sum over its calls.
    """

    name: str
    linear: nn.Linear
    factors: Factors
    # Empty before a pass, whose backward part leaves [B, R] float32 under the name.
    gradients: dict[str, Tensor]
    segments: Callable[[], Segments]  # the samples among the rows, asked for in every forward pass
    factored: bool  # products with W may use the factors
    together: bool  # without operations per sample
    # The forward pass runs twice, so that the first run should compute nothing to keep.
    checkpointing: bool
    kernels: ModuleType | None

    def __post_init__(self) -> None:
        linear = self.linear
        self.values = self.factors.values.to(self.factors.left.dtype)
        has_own_forward = "forward" in vars(linear) or type(linear).forward is not nn.Linear.forward
        self.plain = linear.forward if has_own_forward else None
        self.factored = self.factored and not has_own_forward
        # Requires a gradient and never gets one: it makes the backward pass come here although all
        # weights are frozen.
        self.trigger = torch.zeros((), requires_grad=True)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the output of the Linear; rows that are not all tokens in order are a
        ModelError.
        """
        segments = self.segments()
        # Experts that are shared by all tokens are given all of them in one row, those of a list
        # only some.
        of_list = sum(part.isdigit() for part in self.name.split(".")) > 1
        if inputs.ndim < 2 + of_list or inputs.shape[:-1].numel() != segments.bounds[-1][1]:
            raise ModelError(
                f"{self.name} is given inputs of shape {list(inputs.shape)}",
                wanted="all tokens of the samples and no others; those sent to an expert, or "
                "learnt ones before them, "
                "do not say whose they are",
                do="use a dense model without learnt prompts, or one whose experts are in one "
                "tensor",
            )
        return self.apply(inputs, segments)

    def apply(self, inputs: Tensor, segments: Segments) -> Tensor:
        """Return the output of the Linear for rows whose samples these segments give.

        Some segments may be empty.
        """
        if self.plain is None:
            return cast("Tensor", _Tapped.apply(inputs, self.trigger, self, segments))  # type: ignore[no-untyped-call]
        inputs_NI = inputs.detach().reshape(-1, inputs.shape[-1])
        plan = self.plan(inputs_NI, segments)
        saved = self.along(inputs_NI) if plan.early else inputs_NI

        def leave(saved: Tensor, gradient: Tensor) -> None:
            self.leave(segments, plan, saved, gradient)

        return cast("Tensor", Passed.apply(self.plain(inputs), self.trigger, saved, leave))  # type: ignore[no-untyped-call]

    def plan(self, inputs_NI: Tensor, segments: Segments) -> TapPlan:
        """Return the cheapest plan for these rows."""
        outputs, inputs = self.linear.weight.shape
        rank = self.factors.rank
        tokens = len(inputs_NI) / len(segments.bounds)
        to_output = self.factored and outputs < inputs
        to_input = self.factored and outputs > inputs
        if self.together or not inputs_NI.dtype == self.factors.left.dtype == torch.float32:
            return TapPlan(
                "project",
                to_output or (rank < inputs and not self.checkpointing),
                to_output,
                to_input,
            )
        # Multiplications per token beyond the two products with W. The factors save some of those.
        outer = (1 + rank / tokens) * outputs * inputs
        saved = abs(outputs - inputs) if self.factored else 0
        if outer < rank * (outputs + inputs - saved):
            return TapPlan("outer", early=False, output=False, input=False)
        is_wide = outputs < inputs
        return TapPlan("left" if is_wide else "right", is_wide, to_output, to_input)

    def along(self, inputs_NI: Tensor) -> Tensor:
        """Return the coordinates ``Vh x`` of inputs, [N, R]."""
        right_RI = self.factors.right
        return inputs_NI.to(right_RI.dtype) @ right_RI.T

    def leave(self, segments: Segments, plan: TapPlan, saved: Tensor, gradient: Tensor) -> Tensor:
        """Leave the gradient of every sample, [B, R] float32, or add it to that of another call.

        The forward pass kept inputs or their coordinates. Returns the coordinates ``Uᵀ ∂L/∂y`` of
        gradients, [N, R], where the plan needs them, and the gradients [N, O] elsewhere.
        """
        gradient_NX = gradient.reshape(-1, gradient.shape[-1])
        if plan.order in ("project", "right") or plan.input:
            gradient_NX = gradient_NX.to(self.factors.left.dtype) @ self.factors.left
        rows_BR = self._rows(segments, plan, saved, gradient_NX)
        before_BR = self.gradients.get(self.name)
        self.gradients[self.name] = rows_BR if before_BR is None else before_BR + rows_BR
        return gradient_NX

    def _rows(
        self, segments: Segments, plan: TapPlan, saved: Tensor, gradient_NX: Tensor
    ) -> Tensor:
        if plan.order == "project":
            along_NR = saved if plan.early else self.along(saved)
            return segment_products(gradient_NX, along_NR, segments.offsets, self.kernels)
        left_OR = self.factors.left
        right_RI = self.factors.right
        sums = [gradient_NX[start:end].T @ saved[start:end] for start, end in segments.bounds]
        if plan.order == "outer":
            rows = [delta_gradient(matrix, left_OR, right_RI) for matrix in sums]
        elif plan.order == "left":
            rows = [torch.linalg.vecdot(matrix, left_OR, dim=0) for matrix in sums]
        else:
            rows = [torch.linalg.vecdot(matrix, right_RI) for matrix in sums]
        return torch.stack(rows)


class _Tapped(torch.autograd.Function):
    """A Linear with frozen weights whose backward pass leaves the gradient of δS with its tap.

    What is kept goes through autograd, so that gradient checkpointing drops and recomputes it like
    the rest.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, trigger: Tensor, tap: Tap, segments: Segments) -> Tensor:
        inputs_NI = inputs.reshape(-1, inputs.shape[-1])
        plan = tap.plan(inputs_NI, segments)
        bias = tap.linear.bias
        saved = tap.along(inputs_NI) if plan.early else inputs_NI
        if plan.output:
            output_NO = (saved * tap.values) @ tap.factors.left.T
            if bias is not None:
                output_NO += bias
        else:
            output_NO = functional.linear(inputs_NI, tap.linear.weight, bias)
        ctx.save_for_backward(saved)
        ctx.tap = tap
        ctx.segments = segments
        ctx.plan = plan
        return output_NO.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, None, None, None]:
        (gradient,), (saved,) = gradients, ctx.saved_tensors
        tap = ctx.tap
        with wide_products(gradient):
            projected_NR = tap.leave(ctx.segments, ctx.plan, saved, gradient)
            if not ctx.needs_input_grad[0]:
                result = None
            elif ctx.plan.input:
                result_NI = projected_NR.mul_(tap.values) @ tap.factors.right
                result = result_NI.view(*gradient.shape[:-1], -1)
            else:
                result = gradient @ tap.linear.weight
        return result, None, None, None


class Passed(torch.autograd.Function):
    """The identity on an output; ``gradient_of`` gives the gradient of a second tensor, or none.

    The backward pass asks it, with what was saved and the gradient of the output. What is saved
    goes through autograd, so that a layer that is computed again does not keep it.
    """

    @staticmethod
    @override
    def forward(
        ctx: Any,
        output: Tensor,
        second: Tensor,
        saved: Tensor,
        gradient_of: Callable[[Tensor, Tensor], Tensor | None],
    ) -> Tensor:
        ctx.save_for_backward(saved)
        ctx.gradient_of = gradient_of
        return output.view_as(output)

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor | None, None, None]:
        (gradient,) = gradients
        (saved,) = ctx.saved_tensors
        of_second = None
        if ctx.needs_input_grad[1]:
            with torch.autocast(gradient.device.type, enabled=False), wide_products(gradient):
                of_second = ctx.gradient_of(saved, gradient)
        return gradient, of_second, None, None


def exact_factors(modules: Mapping[str, nn.Linear], factors: Mapping[str, Factors]) -> set[str]:
    """Return the modules whose full factors give their weight back to its precision.

    They are tried on one vector: factors of other weights, or of a shorter dtype, give another
    result.
    """
    tried = {
        name: linear.weight.detach()
        for name, linear in modules.items()
        if factors[name].rank == min(linear.weight.shape)
        and factors[name].left.dtype == linear.weight.dtype
    }
    errors = [_misfit(weight, factors[name]) for name, weight in tried.items()]
    # All at once, for it waits for the device.
    within = torch.stack(errors).tolist() if errors else []
    return {name for name, error in zip(tried, within, strict=True) if error <= 1}


def _misfit(weight_OI: Tensor, factors: Factors) -> Tensor:
    """Return the error of ``U S Vh v`` as a share of what it may be."""
    probe_I = torch.cos(torch.arange(weight_OI.shape[1], device=weight_OI.device)).to(
        weight_OI.dtype
    )
    with own_precision(weight_OI):
        wanted_O = (weight_OI @ probe_I).float()
        found_O = (
            factors.left @ (factors.right @ probe_I * factors.values).to(probe_I.dtype)
        ).float()
    tolerance = _FITS if weight_OI.dtype == torch.float32 else 8 * torch.finfo(weight_OI.dtype).eps
    return cast("Tensor", (found_O - wanted_O).norm() / (tolerance * wanted_O.norm()))
