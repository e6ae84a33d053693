"""One sequence through a model of transformers: the states that the head reads, and the logits that it gives."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from assay.errors import BadWeights, ModelError, OutOfMemory, is_out_of_memory
from assay.models import Model


class CachedForward:
    """Runs one sequence at a time, with a cache of keys and values, so no other request enters its numbers.

    Args:
        model: Model to run.

    Raises:
        ModelError: The model has no head that reads the last hidden state.

    Shapes: T positions, D hidden size, V logits.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._head = head_of(model)
        self._cache: Any = None

    def restart(self) -> None:
        """Forget the sequence."""
        self._cache = None

    @torch.inference_mode()
    def read(self, ids: Sequence[int], *, last: int = 1) -> tuple[Float32[Tensor, "T V"], Float32[Tensor, "T D"]]:
        """Append tokens to the sequence; return logits and hidden states of the last positions, in float32.

        Args:
            ids: Tokens to append.
            last: Number of positions to return; 0 returns all of the tokens appended.

        Raises:
            BadWeights: A state or a logit is NaN, or a state is infinite.
            OutOfMemory: The device ran out of memory.
            ModelError: The architecture cannot be run with a cache.
        """
        states: list[Tensor] = []
        hook = self._head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
        try:
            output = self.model.module(
                input_ids=torch.tensor([list(ids)], device=self.model.device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=last,
            )
            self._cache = output.past_key_values
        except Exception as error:  # every architecture fails in its own way
            raise self._failed(error, len(ids)) from error
        finally:
            hook.remove()
        rows = slice(-last, None) if last else slice(None)  # some architectures return all of them
        logits_TV, hidden_TD = output.logits[0, rows].float(), states[-1][0, rows].float()
        check_finite(self.model, hidden_TD, logits_TV)
        return logits_TV, hidden_TD

    def _failed(self, error: Exception, tokens: int) -> ModelError | OutOfMemory:
        if is_out_of_memory(error):
            return OutOfMemory(
                f"the device ran out of memory on a prompt of {tokens} tokens",
                wanted="room for the activations and the cache of one request",
                do="use shorter prompts, or a smaller dtype",
            )
        return ModelError(
            f"{self.model.reference} ({self.model.architecture}) does not run: {type(error).__name__}: {error}",
            wanted="a decoder that takes tokens and a cache of keys and values",
            do="use another architecture, such as Llama, Qwen3 or Mistral",
        )


def head_of(model: Model) -> nn.Module:
    """Return the module that makes logits of hidden states.

    Raises:
        ModelError: The model has none.
    """
    head = model.module.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Module):
        raise ModelError(
            f"{model.reference} ({model.architecture}) has no output embeddings",
            wanted="a decoder with a head",
            do="use another architecture, such as Llama, Qwen3 or Mistral",
        )
    return head


def check_finite(model: Model, hidden_TD: Tensor, logits_TV: Tensor) -> None:
    """Refuse what a forward pass gave if a state or a logit is NaN, or a state is infinite.

    Raises:
        BadWeights: It is.
    """
    if not bool(torch.isfinite(hidden_TD).all()) or bool(torch.isnan(logits_TV).any()):
        raise BadWeights(
            f"{model.reference} gives NaN or infinity in {model.dtype}",
            wanted="finite hidden states and logits",
            do="check the checkpoint, or use a dtype with more range (--dtype float32)",
        )
