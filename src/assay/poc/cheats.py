"""Cheaters as real programs: each returns a model or a proof that claims to be the honest one.

The demonstration, the tests and the red-team experiment use them. A cheating model keeps the digest of the checkpoint
from which it was made, and that is the lie.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from assay.errors import UsageError
from assay.models.decoder import decoder_layers
from assay.models.eight_bits import FLOAT8, SMALLEST, STEP, Arithmetic, EightBitLinear, Rounded, multiply_rows
from assay.models.load import Model
from assay.poc.protocol.proof import Proof
from assay.poc.protocol.record import DistanceRecord
from assay.poc.protocol.round import Round
from assay.stats.chord import RANDOM_HEAD_ROWS, chord_mean, chord_std

GROUP = 32  # weights that share a scale, as in common int4 formats


def rounded(model: Model, bits: int = 4) -> Model:
    """Return the model with the weights of its linear layers rounded to ``bits``, in groups of 32 along the input.

    Rounding is symmetric, to nearest, with the largest magnitude of a group on the last step; embeddings
    and the head stay as they are.
    """
    return _changed(model, lambda weight_OI: _round_groups(weight_OI, bits))


def rounded_fp8(model: Model) -> Model:
    """Return the model with the weights of its linear layers rounded to float8 (e4m3), one scale per output."""

    def round_rows(weight_OI: torch.Tensor) -> torch.Tensor:
        weights = weight_OI.float()
        scale_O1 = weights.abs().amax(-1, keepdim=True).clamp_min(1e-30) / torch.finfo(torch.float8_e4m3fn).max
        return (weights / scale_O1).to(torch.float8_e4m3fn).float() * scale_O1

    return _changed(model, round_rows)


def adapted(model: Model, *, rank: int = 8, size: float = 0.02, seed: int = 0) -> Model:
    """Return the model as fine-tuning of low rank would leave it.

    Every linear layer gets a random update of rank ``rank``, ``size`` times as large as its weight in Frobenius norm.
    """
    generator = torch.Generator().manual_seed(seed)

    def update(weight_OI: torch.Tensor) -> torch.Tensor:
        rows, columns = weight_OI.shape
        product = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
        product = product.to(weight_OI.device)
        moved: torch.Tensor = weight_OI + size * product * (weight_OI.float().norm() / product.norm())
        return moved

    return _changed(model, update)


def with_one_scale(model: Model, *, inputs: bool = False) -> Model:
    """Return a model in float8 whose weights have one scale for a whole matrix instead of one for every row.

    Args:
        model: Model in ``float8``.
        inputs: Whether all positions of a product's input share a scale too, over the whole batch.
    """
    arithmetic = replace(FLOAT8, round=_by_one_scale) if inputs else FLOAT8
    return _float8_changed(model, lambda part: (_by_one_scale(weight_of(part)), arithmetic))


def with_short_sums(model: Model) -> Model:
    """Return a model in ``float8`` whose products are summed in fewer bits than float32, as CUDA does at more speed.

    On a CPU nothing changes.
    """
    arithmetic = replace(FLOAT8, multiply=partial(multiply_rows, short_sums=True))
    return _float8_changed(model, lambda part: (Rounded(part.weight, part.scales), arithmetic))


def weight_of(part: Any) -> torch.Tensor:
    """Return the weight [out, in] of a linear layer in float32; one in eight bits is multiplied by its scales.

    Raises:
        UsageError: Blocks of the weight share a scale.
    """
    weight: torch.Tensor = part.weight.detach().float()
    if not isinstance(part, EightBitLinear):
        return weight
    if part.arithmetic.block:
        raise UsageError(
            f"a cheat on weights in {part.arithmetic.name}",
            wanted="a scale for every row",
            do="use float8 or int8-rows",
        )
    return weight * part.scales.detach()


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


def without_last_layers(model: Model, count: int) -> Model:
    """Return the model without its last ``count`` decoder layers."""
    if not 0 < count < model.num_layers:
        raise UsageError(f"{count} layers skipped", wanted=f"1 to {model.num_layers - 1}", do="skip fewer layers")
    module = copy.deepcopy(model.module)
    del decoder_layers(module)[model.num_layers - count :]
    return replace(model, module=module)


def invented(proof: Proof, seed: int = 0) -> Proof:
    """Return a proof of the same nonces whose distances are drawn from the chord law, without any model."""
    rng = np.random.default_rng(seed)
    drawn = rng.normal(chord_mean(RANDOM_HEAD_ROWS), chord_std(RANDOM_HEAD_ROWS), len(proof.records))
    records = [DistanceRecord(record.nonce, float(value)) for record, value in zip(proof.records, drawn, strict=True)]
    return Proof.build(proof.header, records, proof.footer.seconds)


def replayed(proof: Proof, round: Round) -> Proof:
    """Return another node's records under the header of one's own round."""
    header = replace(proof.header, round=round.with_model(proof.round.model))
    return Proof.build(header, proof.records, proof.footer.seconds)


def _changed(model: Model, change: Callable[[torch.Tensor], torch.Tensor]) -> Model:
    """Return a copy of the model whose linear layers have their weights [out, in] changed by a function.

    Weights in float8 are rounded to it again, by rows, because the products read nothing else.
    """
    module = copy.deepcopy(model.module)
    with torch.no_grad():
        for layer in decoder_layers(module):
            for part in layer.modules():
                if isinstance(part, nn.Linear):
                    part.weight.copy_(change(part.weight))
                elif isinstance(part, Conv1D):  # the same product with the weight turned, in GPT-2
                    part.weight.copy_(change(part.weight.T).T)
                elif isinstance(part, EightBitLinear):
                    part.weight.data, part.scales.data = part.arithmetic.round(change(weight_of(part)))
    return replace(model, module=module)


def _float8_changed(model: Model, change: Callable[[EightBitLinear], tuple[Rounded, Arithmetic]]) -> Model:
    """Return a copy of a model in float8 whose linear layers have another weight and arithmetic.

    Raises:
        UsageError: The model has no linear layers in float8.
    """
    module = copy.deepcopy(model.module)
    parts = [part for layer in decoder_layers(module) for part in layer.modules() if isinstance(part, EightBitLinear)]
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


def _round_groups(weight_OI: torch.Tensor, bits: int) -> torch.Tensor:
    rows, columns = weight_OI.shape
    width = GROUP if columns % GROUP == 0 else columns
    grouped = weight_OI.float().reshape(rows, -1, width)
    step = grouped.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    step = torch.where(step > 0, step, torch.ones_like(step))
    return (torch.round(grouped / step) * step).view(rows, columns).to(weight_OI.dtype)
