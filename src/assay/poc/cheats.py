"""Cheaters as real programs: each returns a model or a proof that claims to be the honest one.

A cheating model keeps the digest of the checkpoint
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

from assay.errors import UsageError
from assay.models.decoder import decoder_layers
from assay.models.eight_bits import EightBitLinear
from assay.models.model import Model
from assay.poc.protocol.proof import Proof
from assay.poc.protocol.records import Record
from assay.poc.protocol.round import Round
from assay.stats.chord import RANDOM_HEAD_ROWS, chord_mean, chord_std

GROUP = 32  # weights that share a scale, as in common int4 formats


def rounded(model: Model, bits: int = 4) -> Model:
    """Return the model with its linear weights rounded to ``bits``, in groups of 32 inputs.

    Rounding is symmetric, to nearest, with the largest magnitude of a group on the last step;
    embeddings and the head stay as they are.
    """
    return changed(model, lambda weight_OI: _round_groups(weight_OI, bits))


def weight_of(part: Any) -> torch.Tensor:
    """Return the weight [out, in] of a linear layer in float32, eight bits times their scales.

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


def without_last_layers(model: Model, count: int) -> Model:
    """Return the model without its last ``count`` decoder layers."""
    if not 0 < count < model.num_layers:
        raise UsageError(
            f"{count} layers skipped", wanted=f"1 to {model.num_layers - 1}", do="skip fewer layers"
        )
    module = copy.deepcopy(model.module)
    del decoder_layers(module)[model.num_layers - count :]
    return replace(model, module=module)


def invented(proof: Proof, seed: int = 0) -> Proof:
    """Return a proof of the same nonces with distances drawn from the chord law."""
    rng = np.random.default_rng(seed)
    drawn = rng.normal(
        chord_mean(RANDOM_HEAD_ROWS), chord_std(RANDOM_HEAD_ROWS), len(proof.records)
    )
    records = [
        Record(record.nonce, distance=float(value))
        for record, value in zip(proof.records, drawn, strict=True)
    ]
    return Proof.build(proof.header, records, proof.footer.seconds)


def replayed(proof: Proof, round: Round) -> Proof:
    """Return another node's records under the header of one's own round."""
    header = replace(proof.header, round=round.with_model(proof.round.model))
    return Proof.build(header, proof.records, proof.footer.seconds)


def changed(model: Model, change: Callable[[torch.Tensor], torch.Tensor]) -> Model:
    """Return a copy of the model with its linear weights [out, in] changed by a function.

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
                    part.weight.data, part.scales.data = part.arithmetic.round(
                        change(weight_of(part))
                    )
    return replace(model, module=module)


def _round_groups(weight_OI: torch.Tensor, bits: int) -> torch.Tensor:
    rows, columns = weight_OI.shape
    width = GROUP if columns % GROUP == 0 else columns
    grouped = weight_OI.float().reshape(rows, -1, width)
    step = grouped.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    step = torch.where(step > 0, step, torch.ones_like(step))
    return (torch.round(grouped / step) * step).view(rows, columns).to(weight_OI.dtype)
