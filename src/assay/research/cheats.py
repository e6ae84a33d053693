"""Cheaters as real programs: each returns a model or a proof that claims to be the honest one.

The demonstration, the tests and the red-team experiment use them. A cheating model keeps the digest of the checkpoint
from which it was made, and that is the lie.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from assay import stats
from assay.errors import UsageError
from assay.models import Model, decoder_layers
from assay.poc.protocol import RANDOM_HEAD_ROWS, DistanceRecord, Proof, Round

__all__ = ["adapted", "invented", "replayed", "rounded", "rounded_fp8", "with_fewer_experts", "without_last_layers"]

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
    drawn = rng.normal(stats.chord_mean(RANDOM_HEAD_ROWS), stats.chord_std(RANDOM_HEAD_ROWS), len(proof.records))
    records = [DistanceRecord(record.nonce, float(value)) for record, value in zip(proof.records, drawn, strict=True)]
    return Proof.build(proof.header, records, proof.footer.seconds)


def replayed(proof: Proof, round: Round) -> Proof:
    """Return another node's records under the header of one's own round."""
    header = replace(proof.header, round=round.with_model(proof.round.model))
    return Proof.build(header, proof.records, proof.footer.seconds)


def _changed(model: Model, change: Callable[[torch.Tensor], torch.Tensor]) -> Model:
    """Return a copy of the model whose linear layers have their weights [out, in] changed by a function."""
    module = copy.deepcopy(model.module)
    with torch.no_grad():
        for layer in decoder_layers(module):
            for part in layer.modules():
                if isinstance(part, nn.Linear):
                    part.weight.copy_(change(part.weight))
                elif isinstance(part, Conv1D):  # the same product with the weight turned, in GPT-2
                    part.weight.copy_(change(part.weight.T).T)
    return replace(model, module=module)


def _round_groups(weight_OI: torch.Tensor, bits: int) -> torch.Tensor:
    rows, columns = weight_OI.shape
    width = GROUP if columns % GROUP == 0 else columns
    grouped = weight_OI.float().reshape(rows, -1, width)
    step = grouped.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    step = torch.where(step > 0, step, torch.ones_like(step))
    return (torch.round(grouped / step) * step).view(rows, columns).to(weight_OI.dtype)
