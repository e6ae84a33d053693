"""Which of several exact ways the gradient pass takes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from assay.models import decoder_layers
from assay.models.families import attention_window, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Recipe:
    """Switches between ways that differ in time, memory and rounding only.

    Attributes:
        packed: Whether samples stand end to end in one row; otherwise they are padded to one length.
        fused: Whether norms, gated activations and sums over samples run in fused kernels, where there are any.
        factored: Whether U, S and Vh stand for the weight where that saves a product that is needed anyway.
        late: Whether the last layer computes only completion tokens where only they matter; needs ``packed``.
        together: Whether a batch takes few large operations, for a GPU; otherwise each sample takes several, whose
            numbers stay in the caches of a CPU.
    """

    packed: bool
    fused: bool
    factored: bool
    late: bool
    together: bool


def recipe_for(module: "PreTrainedModel") -> Recipe:
    """Return the fastest recipe that is known to be exact for this kind of model."""
    known = _is_listed(module)
    return Recipe(
        packed=known,
        fused=known,
        factored=module.dtype == torch.float32,
        late=known,
        together=module.device.type != "cpu",
    )


def _is_listed(module: "PreTrainedModel") -> bool:
    """Return whether every layer computes what a listed family computes, with the whole sample in sight.

    Projections and norms are called as modules, so they may have hooks and forward functions of their own.
    """
    config = module.config.get_text_config()
    family = family_of(config)
    if family is None or config._attn_implementation not in ("sdpa", "eager") or attention_window(config) is not None:
        return False
    layers: Any = decoder_layers(module)
    if any(type(layer.self_attn).__name__ != f"{family.prefix}Attention" for layer in layers):
        return False
    replaced = [part for layer in layers for part in (layer.self_attn, layer.mlp)]
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in replaced)
    return not hooked and not any("forward" in vars(part) for part in (*layers, *replaced))
