"""Which of several exact ways the gradient pass takes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from assay.models.families import attention_window, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Recipe", "recipe_for"]


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
    known = (
        family_of(config) is not None
        and config._attn_implementation in ("sdpa", "eager")
        and attention_window(config) is None
    )
    return Recipe(
        packed=known,
        fused=known,
        factored=module.dtype == torch.float32,
        late=known,
        together=module.device.type != "cpu",
    )
