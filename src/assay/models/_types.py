"""What loading a model returns, and what is known of a model without loading it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHT_MODES = ("trained", "random-all", "random-embed")


@dataclass(frozen=True, eq=False)
class Model:
    """A causal language model, ready to run, with the facts that identify it.

    Attributes:
        module: Model of transformers, in evaluation mode, on ``device``, in ``dtype``.
        tokenizer: Tokenizer of the model; a ``shape:`` model has None.
        reference: Reference as it was given.
        digest: SHA-256 in hex. For trained weights: of the stored tensors (names, dtypes, shapes, bytes),
            whatever the sharding, the dtype of loading and the device. For random weights: of the recipe.
        weights: Mode, ``"trained"``, ``"random-all"`` or ``"random-embed"``.
        quantised: Format ``"int8"`` or ``"float8"`` where the decoder's weights were rounded to eight bits, else empty.
        devices: Number of devices over which the weights are spread.
    """

    module: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"
    reference: str
    digest: str
    weights: str
    quantised: str = ""
    devices: int = 1

    @property
    def hidden_size(self) -> int:
        """Width of the hidden state."""
        return int(self.module.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.module.config.num_hidden_layers)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding matrix."""
        return int(self.module.config.vocab_size)

    @property
    def max_positions(self) -> int:
        """The longest sequence the model is made for, in tokens."""
        return int(self.module.config.max_position_embeddings)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters that are not quantised."""
        return next(self.module.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device the parameters are on."""
        return next(self.module.parameters()).device

    @property
    def architecture(self) -> str:
        """The transformers class, for example ``"Qwen3ForCausalLM"``."""
        return type(self.module).__name__
