"""What is known of a model from its configuration alone."""

from dataclasses import dataclass
from pathlib import Path

import torch

from assay.models._random import build
from assay.models._resolve import CATALOGUE, resolve
from assay.models.families import expert_count


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model from its configuration alone.

    ``parameters`` counts a tied matrix once. ``num_kv_heads`` equals ``num_heads`` without grouped queries,
    and ``experts`` is 0 without a mixture of them.
    """

    reference: str
    architecture: str
    parameters: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    max_positions: int
    experts: int
    licence: str
    note: str


def list_models() -> list[ModelInfo]:
    """Return the facts of the bundled reference models, then those of the bundled shapes."""
    return [model_info(reference) for reference in CATALOGUE]


def model_info(reference: str | Path) -> ModelInfo:
    """Return what is known of a model without reading its weights; parameters are counted on the meta device.

    Raises:
        ModelNotFound: There is no such model.
        ModelError: The configuration cannot be used.
    """
    source = resolve(reference)
    config = source.config
    with torch.device("meta"):
        module = build(config, torch.float32)
    entry, config = CATALOGUE.get(source.reference), config.get_text_config(decoder=True)
    return ModelInfo(
        reference=source.reference,
        architecture=type(module).__name__,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        experts=expert_count(config),
        licence=entry.licence if entry else "unknown",
        note=entry.note if entry else str(source.directory),
    )
