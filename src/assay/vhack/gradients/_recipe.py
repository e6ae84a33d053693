"""Which of several exact ways the gradient pass takes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Recipe", "recipe_for"]

# Decoders whose layers are attention, a gated MLP and norms and are told of positions: read, not guessed.
_KNOWN = ("granite", "llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Recipe:
    """Switches between ways that differ in time, memory and rounding only.

    Attributes:
        packed: samples end to end in one row; otherwise padded to one length.
        fused: norms, gated activations and sums over samples by kernels of our own, where there are any.
        factored: multiply by U, S and Vh where that gives a product for free that is needed anyway.
        late: in the last layer compute what only completion tokens need for these only; needs ``packed``.
        together: few large operations over all samples of a batch, for a GPU; otherwise several per sample, whose
            numbers stay in the caches of a CPU.
    """

    packed: bool
    fused: bool
    factored: bool
    late: bool
    together: bool


def recipe_for(module: "PreTrainedModel") -> Recipe:
    """The fastest recipe that is known to be exact for this kind of model."""
    config = module.config.get_text_config()
    known = config.model_type in _KNOWN and config._attn_implementation in ("sdpa", "eager") and not _windows(config)
    return Recipe(
        packed=known,
        fused=known,
        factored=module.dtype == torch.float32,
        late=known,
        together=module.device.type != "cpu",
    )


def _windows(config: object) -> bool:
    """Whether some layer's attention looks back over a window only."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None
