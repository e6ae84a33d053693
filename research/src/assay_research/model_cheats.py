"""Further cheaters on a model, beside those of :mod:`assay.poc.cheats`; each keeps the digest of
the honest one.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from assay.errors import UsageError
from assay.models.decoder import decoder_layers
from assay.models.eight_bits import (
    FLOAT8,
    SMALLEST,
    STEP,
    Arithmetic,
    EightBitLinear,
    Rounded,
    multiply_rows,
)
from assay.models.model import Model
from assay.poc.cheats import changed, weight_of


def rounded_fp8(model: Model) -> Model:
    """Return the model with the weights of its linear layers rounded to float8 (e4m3), one scale
    per output.
    """

    def round_rows(weight_OI: torch.Tensor) -> torch.Tensor:
        weights = weight_OI.float()
        scale_O1 = (
            weights.abs().amax(-1, keepdim=True).clamp_min(1e-30)
            / torch.finfo(torch.float8_e4m3fn).max
        )
        return (weights / scale_O1).to(torch.float8_e4m3fn).float() * scale_O1

    return changed(model, round_rows)


def adapted(model: Model, *, rank: int = 8, size: float = 0.02, seed: int = 0) -> Model:
    """Return the model as fine-tuning of low rank would leave it.

    Every linear layer gets a random update of rank ``rank``, ``size`` times as large as its weight
    in Frobenius norm.
    """
    generator = torch.Generator().manual_seed(seed)

    def update(weight_OI: torch.Tensor) -> torch.Tensor:
        rows, columns = weight_OI.shape
        product = torch.randn(rows, rank, generator=generator) @ torch.randn(
            rank, columns, generator=generator
        )
        product = product.to(weight_OI.device)
        moved: torch.Tensor = weight_OI + size * product * (
            weight_OI.float().norm() / product.norm()
        )
        return moved

    return changed(model, update)


def with_one_scale(model: Model, *, inputs: bool = False) -> Model:
    """Return a model in float8 whose weights have one scale for a whole matrix instead of one for
    every row.

    Args:
        model: Model in ``float8``.
        inputs: Whether all positions of a product's input share a scale too, over the whole batch.
    """
    arithmetic = replace(FLOAT8, round=_by_one_scale) if inputs else FLOAT8
    return _float8_changed(model, lambda part: (_by_one_scale(weight_of(part)), arithmetic))


def with_short_sums(model: Model) -> Model:
    """Return a model in ``float8`` whose products are summed in fewer bits than float32, as CUDA
    does at more speed.

    On a CPU nothing changes.
    """
    arithmetic = replace(FLOAT8, multiply=partial(multiply_rows, short_sums=True))
    return _float8_changed(model, lambda part: (Rounded(part.weight, part.scales), arithmetic))


def with_fewer_experts(model: Model, count: int) -> Model:
    """Return a mixture of experts that asks only the ``count`` likeliest experts of every token.

    Raises:
        UsageError: The model has no experts, or asks at most ``count`` of them anyway.
    """
    module = copy.deepcopy(model.module)
    parts: list[Any] = [part for layer in decoder_layers(module) for part in layer.modules()]
    routers = [part for part in parts if hasattr(part, "top_k")]
    if not routers or not 0 < count < routers[0].top_k:
        raise UsageError(
            f"{count} experts of {model.architecture}",
            wanted="fewer experts for each token than the model asks",
            do="use a mixture of experts, and a smaller number",
        )
    for router in routers:
        router.top_k = count
    return replace(model, module=module)


def _float8_changed(
    model: Model, change: Callable[[EightBitLinear], tuple[Rounded, Arithmetic]]
) -> Model:
    """Return a copy of a model in float8 whose linear layers have another weight and arithmetic.

    Raises:
        UsageError: The model has no linear layers in float8.
    """
    module = copy.deepcopy(model.module)
    parts = [
        part
        for layer in decoder_layers(module)
        for part in layer.modules()
        if isinstance(part, EightBitLinear)
    ]
    if model.quantised != "float8" or not parts:
        raise UsageError(
            f"{model.reference} in {model.quantised or model.dtype}",
            wanted="float8",
            do="load it with quantise='float8'",
        )
    for part in parts:
        (part.weight.data, part.scales.data), part.arithmetic = change(part)
    return replace(model, module=module)


def _by_one_scale(x: torch.Tensor) -> Rounded:
    """Round a whole tensor to e4m3 by one scale, which stands in every row."""
    scale = x.abs().max().float().clamp_min(SMALLEST) * STEP
    values = (x * scale.reciprocal()).to(torch.float8_e4m3fn)
    return Rounded(values, scale.expand(*x.shape[:-1], 1).contiguous())
