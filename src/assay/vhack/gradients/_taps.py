"""Linears that leave the δS gradient of every sample behind when the backward pass goes through them.

With ``y = W x`` replaced by ``(W + U diag(δS) Vh) x`` the gradient at δS = 0 of a loss L is

    g_b = Σ_t (Uᵀ ∂L/∂y_bt) ⊙ (Vh x_bt)

over all tokens t of sample b, prompt tokens too, for attention carries the loss back to them. Samples do not mix in the
forward pass, so one backward pass of the sum of their losses gives every g_b.

The sum is done in one of several ways that differ in rounding only. With G_b = Σ_t ∂L/∂y_bt x_btᵀ, the gradient of W:

- *project*: ``c = Vh x`` and ``p = Uᵀ ∂L/∂y`` per token, then the sum over tokens of their product; in any dtype;
- *right*: ``p`` only, then the diagonal of ``(Σ_t p xᵀ) Vhᵀ``;
- *left*: ``c`` only, then the diagonal of ``Uᵀ (Σ_t ∂L/∂y cᵀ)``;
- *outer*: G_b itself, then the diagonal of ``Uᵀ G_b Vhᵀ``;
- *inner*: from what the pass computes anyway. Where W has more rows than columns, the diagonal of
  ``Vh (Σ_t xᵀ∂L/∂x) Vhᵀ`` over S, for ``∂L/∂x = Wᵀ ∂L/∂y = Vhᵀ S p``; otherwise the diagonal of
  ``Uᵀ (Σ_t y ∂L/∂yᵀ) U`` over S, for ``y = W x = U S c``.

All but the first keep a sum over tokens in a matrix before it is projected, so they are for float32 only, and take a
few large products per sample, which suits a CPU. The last divides by singular values, which lifts the rounding of what
it divides by as much as they differ: it is for matrices whose condition is small, as that of long ones is.

``W = U S Vh`` gives some products for less. Where W has more rows than columns, ``Wᵀ ∂L/∂y = Vhᵀ S p`` costs the
smaller side squared once p is known; where it has more columns, so does ``W x = U S c``. This is as exact as the
factors.

Shapes: N rows (tokens of all samples), B samples, O outputs, I inputs, R coordinates of δS.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from assay.errors import ModelError
from assay.vhack.gradients._fused import segment_products
from assay.vhack.gradients._segments import Segments
from assay.vhack.gradients._svd import Factors

__all__ = ["Tap", "Way", "fitting"]

_FITS = 1e-5
# Largest ratio of singular values that results are divided by. Measured against float64, with singular values spread
# evenly on a logarithmic scale, it adds a relative error of 2.5e-8 times the ratio: 8e-7 of the 1e-5 that is promised.
_CONDITION = 32.0


@dataclass(frozen=True)
class Way:
    """How one tap computes what it has to.

    Attributes:
        how: ``"project"``, ``"right"``, ``"left"``, ``"outer"`` or ``"inner"``.
        early: ``Vh x`` is computed in the forward pass and kept, and x is not.
        output, input: ``W x`` and ``Wᵀ ∂L/∂y`` come from the factors.
    """

    how: str
    early: bool
    output: bool
    input: bool


class Tap:
    """What replaces the forward function of a Linear.

    Args:
        name: of the module.
        linear: its weight and bias are used and stay as they are.
        factors: of the weight.
        found: filled by every backward pass with [B, R] float32 under the name.
        segments: called in the forward pass for the bounds of the samples among the rows.
        factored: use the factors for products with W.
        together: no operations per sample.
        checkpointing: the forward pass runs twice, so nothing should be computed in it that the first run throws away.
        use: kernels for the sum over tokens, or None.

    A Linear with a forward function of its own keeps it, and the tap stands behind it.
    """

    def __init__(
        self,
        name: str,
        linear: nn.Linear,
        factors: Factors,
        found: dict[str, Tensor],
        segments: Callable[[], Segments],
        *,
        factored: bool,
        together: bool,
        checkpointing: bool,
        use: ModuleType | None,
    ) -> None:
        self.name, self.linear, self.factors, self.found = name, linear, factors, found
        self.segments, self.checkpointing, self.use = segments, checkpointing, use
        self.values = factors.values.to(factors.left.dtype)
        self.plain = linear.forward if _has_own_forward(linear) else None
        self.factored, self.together = factored and self.plain is None, together
        self.narrow = linear.weight.shape[0] < linear.weight.shape[1]
        self.even = self.factored and not together and float(factors.values[0] / factors.values[-1]) <= _CONDITION
        # Requires a gradient and never gets one: it makes the backward pass come here although all weights are frozen.
        self.trigger = torch.zeros((), requires_grad=True)

    def __call__(self, inputs: Tensor) -> Tensor:
        """The output of the Linear.

        Raises:
            ModelError: the rows are not all tokens in their order.
        """
        segments = self.segments()
        if inputs.ndim != 3 or inputs.shape[0] * inputs.shape[1] != segments.bounds[-1][1]:
            raise ModelError(
                f"{self.name} is given inputs of shape {list(inputs.shape)}",
                wanted="[samples, tokens, width]: tokens that were sent to an expert no longer say whose they are",
                do="use a dense model",
            )
        output: Tensor
        if self.plain is None:
            output = _Tapped.apply(inputs, self.trigger, self, segments)  # type: ignore[no-untyped-call]
        else:
            plain, kept = self.plain(inputs), inputs.detach()
            output = _Behind.apply(plain, self.trigger, kept, self, segments)  # type: ignore[no-untyped-call]
        return output

    def way(self, inputs_NI: Tensor, segments: Segments) -> Way:
        """The cheapest way for these rows."""
        outputs, inputs = self.linear.weight.shape
        rank, tokens = self.factors.rank, len(inputs_NI) / len(segments.bounds)
        to_output, to_input = self.factored and outputs < inputs, self.factored and outputs > inputs
        if self.together or not inputs_NI.dtype == self.factors.left.dtype == torch.float32:
            return Way("project", to_output or (rank < inputs and not self.checkpointing), to_output, to_input)
        # Multiplications per token beyond the two products with W. The factors save some of those.
        outer = (1 + rank / tokens) * outputs * inputs
        saved = max(outputs, inputs) - min(outputs, inputs) if to_output or to_input else 0
        sided = rank * (outputs + inputs - saved)
        inner = (1 + rank / tokens) * rank**2
        if self.even and inner < min(sided, outer):
            return Way("inner", early=False, output=False, input=False)
        if outer < sided:
            return Way("outer", early=False, output=False, input=False)
        return Way("left" if outputs < inputs else "right", outputs < inputs, to_output, to_input)


class _Tapped(torch.autograd.Function):
    """A Linear with frozen weights whose backward pass leaves the gradient of δS with its tap.

    What is kept goes through autograd, so that gradient checkpointing drops and recomputes it like the rest.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, trigger: Tensor, tap: Tap, segments: Segments) -> Tensor:
        inputs_NI = inputs.reshape(-1, inputs.shape[-1])
        way = tap.way(inputs_NI, segments)
        kept, bias = _coordinates(inputs_NI, tap) if way.early else inputs_NI, tap.linear.bias
        if way.output:
            output_NO = (kept * tap.values) @ tap.factors.left.T
            if bias is not None:
                output_NO += bias
        elif way.how == "inner" and tap.narrow:
            kept = inputs_NI @ tap.linear.weight.T
            output_NO = kept if bias is None else kept + bias
        else:
            output_NO = functional.linear(inputs_NI, tap.linear.weight, bias)
        ctx.save_for_backward(kept)
        ctx.tap, ctx.segments, ctx.way = tap, segments, way
        return output_NO.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = gradients
        (kept,) = ctx.saved_tensors
        tap, way = ctx.tap, ctx.way
        gradient_NO = gradient.reshape(-1, gradient.shape[-1])
        if way.how == "inner" and not tap.narrow:
            result_NI = gradient_NO @ tap.linear.weight
            tap.found[tap.name] = _inner(kept, result_NI, ctx.segments, tap)
            return result_NI.view(*gradient.shape[:-1], -1), None, None, None
        projected_NR = None
        if way.how in ("project", "right") or way.input:
            projected_NR = gradient_NO.to(tap.factors.left.dtype) @ tap.factors.left
        tap.found[tap.name] = _reduce(kept, gradient_NO, projected_NR, ctx.segments, tap, way)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        if way.input:
            assert projected_NR is not None
            result_NI = projected_NR.mul_(tap.values) @ tap.factors.right
        else:
            result_NI = gradient_NO @ tap.linear.weight
        return result_NI.view(*gradient.shape[:-1], -1), None, None, None


class _Behind(torch.autograd.Function):
    """The identity on what a Linear gave by its own forward function, with the same backward pass beside it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, trigger: Tensor, inputs: Tensor, tap: Tap, segments: Segments) -> Tensor:
        inputs_NI = inputs.reshape(-1, inputs.shape[-1])
        way = tap.way(inputs_NI, segments)
        ctx.save_for_backward(_coordinates(inputs_NI, tap) if way.early else inputs_NI)
        ctx.tap, ctx.segments, ctx.way = tap, segments, way
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = gradients
        (kept,) = ctx.saved_tensors
        gradient_NO = gradient.reshape(-1, gradient.shape[-1])
        projected_NR = gradient_NO.to(ctx.tap.factors.left.dtype) @ ctx.tap.factors.left
        ctx.tap.found[ctx.tap.name] = _reduce(kept, gradient_NO, projected_NR, ctx.segments, ctx.tap, ctx.way)
        return gradient, None, None, None, None


def _has_own_forward(linear: nn.Linear) -> bool:
    return "forward" in vars(linear) or type(linear).forward is not nn.Linear.forward


def _reduce(
    kept: Tensor, gradient_NO: Tensor, projected_NR: Tensor | None, segments: Segments, tap: Tap, way: Way
) -> Tensor:
    """The gradient of every sample, [B, R] float32."""
    left_OR, right_RI = tap.factors.left, tap.factors.right
    if way.how == "project":
        assert projected_NR is not None
        coordinates_NR = kept if way.early else _coordinates(kept, tap)
        return segment_products(projected_NR, coordinates_NR, segments.offsets, tap.use)
    if way.how == "inner":
        return _inner(kept, gradient_NO, segments, tap)
    behind = projected_NR if way.how == "right" else gradient_NO
    assert behind is not None
    to_left = way.how == "left" or (way.how == "outer" and left_OR.shape[0] < right_RI.shape[1])
    rows = []
    for start, end in segments.bounds:
        total = behind[start:end].T @ kept[start:end]
        if way.how == "outer":
            total = total @ right_RI.T if to_left else left_OR.T @ total
        rows.append(torch.linalg.vecdot(total, left_OR, dim=0) if to_left else torch.linalg.vecdot(total, right_RI))
    return torch.stack(rows)


def _inner(first_NX: Tensor, second_NX: Tensor, segments: Segments, tap: Tap) -> Tensor:
    """The same from both sides of the smaller width X = R, [B, R]: x and ∂L/∂x, or y and ∂L/∂y."""
    turn_XR = tap.factors.left if tap.narrow else tap.factors.right.T
    squares = [first_NX[start:end].T @ second_NX[start:end] for start, end in segments.bounds]
    turned_BXR = (torch.cat(squares) @ turn_XR).view(len(squares), *turn_XR.shape)
    return turned_BXR.mul_(turn_XR).sum(1).div_(tap.values)


def _coordinates(inputs_NI: Tensor, tap: Tap) -> Tensor:
    right_RI = tap.factors.right
    coordinates_NR: Tensor = inputs_NI.to(right_RI.dtype) @ right_RI.T
    return coordinates_NR


def fitting(modules: Mapping[str, nn.Linear], factors: Mapping[str, Factors]) -> set[str]:
    """The modules whose factors are all there and give their very weight back, to the precision of its dtype.

    They are tried on one vector: factors of other weights, or of a shorter dtype, give another result.
    """
    tried = [name for name, linear in modules.items() if _may_fit(linear, factors[name])]
    errors = [_misfit(modules[name], factors[name]) for name in tried]
    within = torch.stack(errors).tolist() if errors else []  # all at once, for it waits for the device
    return {name for name, error in zip(tried, within, strict=True) if error <= 1}


def _may_fit(linear: nn.Linear, factors: Factors) -> bool:
    return factors.rank == min(linear.weight.shape) and factors.left.dtype == linear.weight.dtype


def _misfit(linear: nn.Linear, factors: Factors) -> Tensor:
    """The error of ``U S Vh v`` as a share of what it may be."""
    weight_OI = linear.weight.detach()
    probe_I = torch.cos(torch.arange(weight_OI.shape[1], device=weight_OI.device)).to(weight_OI.dtype)
    wanted_O = (weight_OI @ probe_I).float()
    found_O = (factors.left @ (factors.right @ probe_I * factors.values).to(probe_I.dtype)).float()
    tolerance = _FITS if weight_OI.dtype == torch.float32 else 8 * torch.finfo(weight_OI.dtype).eps
    share: Tensor = (found_O - wanted_O).norm() / (tolerance * wanted_O.norm())
    return share
