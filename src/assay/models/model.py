"""A loaded model: its module and tokenizer, with the facts that identify it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from assay.errors import UsageError
from assay.models.decoder import expert_count
from assay.models.frame import Frame

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Model:
    """A causal language model, ready to run, with the facts that identify it.

    Attributes:
        module: Model of transformers, in evaluation mode, on ``device``, in ``dtype``.
        tokenizer: Tokenizer of the model; a ``shape:`` model has None.
        reference: Reference as it was given.
        digest: SHA-256 in hex. For trained weights: of the stored tensors (names, dtypes, shapes,
            bytes), whatever the sharding, the dtype of loading and the device. For random weights:
            of the recipe.
        weights: Mode, ``"trained"``, ``"random-all"`` or ``"random-embed"``.
        quantised: Format of :data:`assay.models.NUMBER_FORMATS` where the decoder's weights are in
            eight bits, as they were stored or rounded; else empty.
        frame: Frame of the checkpoint, where the network has one (:meth:`with_frame`).
    """

    module: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"
    reference: str
    digest: str
    weights: str
    quantised: str = ""
    frame: Frame | None = None

    def with_frame(self, frame: "Frame | str | Path | None") -> "Model":
        """Return the model with a frame of its checkpoint, read if it is a file; None removes it.

        Raises:
            DataError: The file cannot be read, or is no frame.
            UsageError: The frame is of another checkpoint.
        """
        if isinstance(frame, str | Path):
            frame = Frame.load(frame)
        if frame is not None and (frame.digest, frame.weights) != (self.digest, self.weights):
            raise UsageError(
                f"a frame of another checkpoint ({frame.weights}, {frame.digest[:12]})",
                wanted=f"that of {self.reference} ({self.weights}, {self.digest[:12]})",
                do="fetch the frame of this model, or make it with `assay poc frame`",
            )
        return replace(self, frame=frame)

    @property
    def config(self) -> "PreTrainedConfig":
        """Configuration of the text decoder; of a vision-language model, its nested text config."""
        return self.module.config.get_text_config(decoder=True)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden state."""
        return int(self.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config.num_hidden_layers)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding matrix."""
        return int(self.config.vocab_size)

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a text: of the generation config, else of the config; and the tokenizer.

        They may differ: a chat model often ends a text by one token and a turn by another.
        """
        generation_config = getattr(self.module, "generation_config", None)
        stated = getattr(generation_config, "eos_token_id", None)
        if stated is None:
            stated = getattr(self.module.config, "eos_token_id", None)
        tokens = list(stated) if isinstance(stated, list | tuple) else [stated]
        tokens.append(getattr(self.tokenizer, "eos_token_id", None))
        return frozenset(token for token in tokens if token is not None)

    @property
    def experts(self) -> int:
        """Experts among which a layer of a mixture chooses; 0 for a model without them."""
        return expert_count(self.config)

    @property
    def max_positions(self) -> int:
        """The longest sequence the model is made for, in tokens."""
        return int(self.config.max_position_embeddings)

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


PreTrained: TypeAlias = "PreTrainedModel"
"""A model of transformers, whose import takes seconds."""

AnyModel: TypeAlias = "Model | PreTrainedModel"
"""A loaded model, or one of transformers."""

Tokenizer: TypeAlias = "PreTrainedTokenizerBase"
AnyTokenizer: TypeAlias = "PreTrainedTokenizerBase | None"
"""A tokenizer; None stands for that of a loaded model, or for no tokenizer at all."""
