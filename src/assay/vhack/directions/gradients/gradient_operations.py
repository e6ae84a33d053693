"""Norms, gated activations and sums over samples in few passes over memory.

On a GPU they are triton kernels. Where triton is missing or cannot build them, and on a CPU, they
are torch; a CPU gains from a norm whose backward pass is written out, and nothing from the rest.

Without them the gradients of Qwen3-4B take 0.80 s for 0.58 s on an H200
(vhack_gradients_h200_bfloat16.json, "not fused"), and those of the bundled Qwen3 1.07 times as long
on one CPU thread; frozen bases have that norm's bits (vhack_ways_cpu.json).

Shapes: N rows of all samples end to end, B samples, R coordinates, H numbers that are normalised
    together.
"""

import importlib
from functools import cache
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from assay.models.decoder import FAMILIES


@cache
def load_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """Return the triton kernels, or None where they cannot be built or differ from torch."""
    if device.type != "cuda":
        return None
    try:
        kernels = importlib.import_module("assay.vhack.directions.gradients.gradient_kernels")
        with torch.cuda.device(device):
            return (
                kernels if _works(kernels, torch.ones(2, 8, device=device, dtype=dtype)) else None
            )
    except Exception:
        # Whatever a missing compiler, driver or header raises, torch can do the same.
        return None


def _works(kernels: ModuleType, ones: Tensor) -> bool:
    """Try every kernel on ones, for which the results are known."""
    silu = 0.7310586
    # SiLU at 1: σ(1), and its derivative σ(1) (2 − σ(1)).
    slope = 0.9276705
    unit, scale = kernels.normalise(ones, ones[0], 0.0)
    results = (
        (kernels.segment_products(ones, ones, torch.tensor([0, 2], device=ones.device)), 2.0),
        (unit, 1.0),
        (kernels.normalise_backward(ones, ones, ones[0], scale), 0.0),
        (kernels.gate(ones, ones), silu),
        *zip(kernels.gate_backward(ones, ones, ones), (slope, silu), strict=True),
    )
    return all(
        bool(((result.float() - expected).abs() < 0.01).all()) for result, expected in results
    )


def segment_products(
    left_NR: Tensor, right_NR: Tensor, offsets: Tensor, kernels: ModuleType | None
) -> Tensor:
    """Return the sum of the elementwise product over the rows of every sample, [B, R] float32.

    Sample b has the rows from ``offsets[b]`` to ``offsets[b + 1]``; these are [B + 1] int64 on the
    device.
    """
    if kernels is not None:
        return cast(
            "Tensor",
            kernels.segment_products(left_NR.contiguous(), right_NR.contiguous(), offsets),
        )
    return torch.segment_reduce(
        left_NR.float() * right_NR, "sum", offsets=offsets, axis=0, unsafe=True
    )


class Norm(torch.autograd.Function):
    """``x / √(mean x² + eps) · weight`` over the last dimension; the weight is frozen."""

    @staticmethod
    @override
    def forward(
        ctx: Any, x: Tensor, weight_H: Tensor, eps: float, kernels: ModuleType | None
    ) -> Tensor:
        x_MH = x.reshape(-1, x.shape[-1])
        if kernels is not None:
            y_MH, scale = kernels.normalise(x_MH, weight_H, eps)
        else:
            size_M1 = torch.linalg.vector_norm(x_MH, dim=1, keepdim=True, dtype=torch.float32)
            scale = size_M1.square_().div_(x_MH.shape[1]).add_(eps).rsqrt_()
            y_MH = (x_MH * scale).to(x.dtype).mul_(weight_H)
        ctx.save_for_backward(x_MH, weight_H, scale)
        ctx.kernels = kernels
        return cast("Tensor", y_MH.view(x.shape))

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        (dy,) = gradients
        x_MH, weight_H, scale = ctx.saved_tensors
        dy_MH = dy.reshape(x_MH.shape)
        if ctx.kernels is not None:
            dx_MH = ctx.kernels.normalise_backward(dy_MH, x_MH, weight_H, scale)
        else:
            x_MH = x_MH.float()
            dx_MH = dy_MH.float() * weight_H
            along_M1 = torch.linalg.vecdot(dx_MH, x_MH).unsqueeze(1)
            along_M1 = along_M1.mul_(scale.square()).div_(x_MH.shape[1])
            dx_MH = dx_MH.addcmul_(x_MH, along_M1, value=-1).mul_(scale).to(dy.dtype)
        return dx_MH.view(dy.shape), None, None, None


class GatedActivation(torch.autograd.Function):
    """``silu(a) · b`` by the kernels."""

    @staticmethod
    @override
    def forward(ctx: Any, a: Tensor, b: Tensor, kernels: ModuleType) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.kernels = kernels
        return cast("Tensor", kernels.gate(a.contiguous(), b.contiguous()))

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None]:
        (dy,) = gradients
        a, b = ctx.saved_tensors
        da, db = ctx.kernels.gate_backward(dy.contiguous(), a.contiguous(), b.contiguous())
        return da, db, None


class TokenLoss(torch.autograd.Function):
    """The negative log-likelihood of every row's target in float32; one backward pass only."""

    @staticmethod
    @override
    def forward(ctx: Any, logits_MV: Tensor, target_M: Tensor) -> Tensor:
        logs_MV = torch.log_softmax(logits_MV, dim=1, dtype=torch.float32)
        ctx.logs = logs_MV
        ctx.target = target_M
        ctx.dtype = logits_MV.dtype
        return logs_MV.gather(1, target_M[:, None])[:, 0].neg()

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (gradient_M,) = gradients
        result_MV = ctx.logs.exp_().mul_(gradient_M[:, None])
        # The graph outlives this step, and with a large vocabulary nothing is larger.
        ctx.logs = None
        result_MV.scatter_add_(1, ctx.target[:, None], -gradient_M[:, None])
        return result_MV.to(ctx.dtype), None


def is_plain_norm(module: nn.Module) -> bool:
    """Return whether a module is the norm of a listed family, which is what `Norm` computes."""
    kind = type(module)
    return (
        kind.__name__ in [f"{family.prefix}RMSNorm" for family in FAMILIES.values()]
        and kind.__module__.startswith("transformers.models.")
        and "forward" not in vars(module)
    )
