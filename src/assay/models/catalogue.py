"""Facts of bundled and other models, as far as their configuration shows them."""

from dataclasses import dataclass, fields
from pathlib import Path

from assay.files.references import CATALOGUE
from assay.models.configuration import build_empty, count_parameters
from assay.models.decoder import expert_count
from assay.models.resolve import resolve


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model from its configuration alone.

    ``parameters`` counts a tied matrix once. ``num_kv_heads`` equals ``num_heads`` without grouped
    queries, and ``experts`` is 0 without a mixture of them.
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
    names = [field.name for field in fields(ModelInfo)]
    return [ModelInfo(**{name: facts[name] for name in names}) for facts in CATALOGUE.values()]


def model_info(reference: str | Path) -> ModelInfo:
    """Return what is known of a model without reading its weights.

    Raises:
        ModelNotFound: There is no such model.
        ModelError: The configuration cannot be used.
    """
    source = resolve(reference, with_weights=False)
    module = build_empty(source.config)
    listed = CATALOGUE.get(source.reference, {})
    config = source.config.get_text_config(decoder=True)
    return ModelInfo(
        reference=source.reference,
        architecture=type(module).__name__,
        parameters=count_parameters(module),
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        experts=expert_count(config),
        licence=listed.get("licence", "unknown"),
        note=listed.get("note", str(source.directory or source.reference)),
    )
