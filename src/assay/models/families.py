"""The one list of decoder architectures that assay knows layer by layer, and of the projections in a layer.

An architecture is listed when its layers are attention with rotary positions and a gated MLP, each after an RMS norm
that multiplies by its weight. The functional decoder, the packed gradient pass and the experiment of many runs ask
this list; every other architecture runs as transformers defines it. A test builds a model of each family and compares.
"""

from dataclasses import dataclass
from typing import Any

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Names of the projections of attention, in the order in which a layer uses them."""

MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
"""Names of the projections of a gated MLP, in the order in which a layer uses them."""

TARGETS = ATTENTION_TARGETS + MLP_TARGETS
"""Names of all projections of a layer: the weight matrices that carry δS, which embeddings and the head do not."""

FUSED_TARGETS = ("qkv_proj", "gate_up_proj")
"""Names of projections that hold several of these in one matrix, in other architectures; they carry δS as a whole."""


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: Name in ``config.json``.
        prefix: Prefix of its classes in transformers, for example ``"Llama"`` of ``LlamaAttention``.
        plain: Whether a layer adds what attention and MLP return as it is. Granite multiplies it first.
    """

    model_type: str
    prefix: str
    plain: bool = True


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "Llama"),
        Family("mistral", "Mistral"),
        Family("qwen2", "Qwen2"),
        Family("qwen3", "Qwen3"),
        Family("granite", "Granite", plain=False),
    )
}
"""The families by model type."""


MIXTURES = {family.model_type: family for family in (Family("qwen3_moe", "Qwen3Moe"),)}
"""Architectures whose layers have a mixture of experts in place of the MLP, by model type. Only the engine asks."""


def family_of(config: Any) -> Family | None:
    """Return the family of a transformers configuration, or None if its architecture is not listed.

    Args:
        config: Configuration of a model, or of a model that wraps a text decoder.
    """
    return FAMILIES.get(config.get_text_config().model_type)


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def expert_count(config: Any) -> int:
    """Return how many experts a layer chooses among, by what configurations call them; 0 without a mixture.

    Args:
        config: Configuration of a model, or of a model that wraps a text decoder.
    """
    text = config.get_text_config(decoder=True)
    counts = [value for name in _EXPERTS if type(value := getattr(text, name, None)) is int]
    return count if (count := max(counts, default=0)) > 1 else 0


def attention_window(config: Any) -> int | None:
    """Return how many positions the layer with the shortest view looks back, or None if all layers see everything.

    Args:
        config: Configuration of a model, or of a model that wraps a text decoder. Layers of another kind than full or
            sliding attention count as a view of no positions.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        return 0
    if kinds == {"full_attention"}:
        return None
    window = getattr(text, "sliding_window", None)
    return None if window is None else int(window)
