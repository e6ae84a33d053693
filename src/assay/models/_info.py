"""Facts of a model from its configuration alone, without its weights."""

from pathlib import Path

import torch

from assay.models._catalogue import CATALOGUE
from assay.models._random import build
from assay.models._resolve import resolve
from assay.models._types import ModelInfo


def list_models() -> list[ModelInfo]:
    """The bundled reference models, then the bundled shapes."""
    return [model_info(reference) for reference in CATALOGUE]


def model_info(reference: str | Path) -> ModelInfo:
    """What is known of a model without reading its weights; parameters are counted on the meta device.

    Raises:
        ModelNotFound: there is no such model.
        ModelError: its configuration cannot be used.
    """
    source = resolve(reference)
    config = source.config
    with torch.device("meta"):
        module = build(config, torch.float32)
    entry = CATALOGUE.get(source.reference)
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
        licence=entry.licence if entry else "unknown",
        note=entry.note if entry else str(source.directory),
    )
