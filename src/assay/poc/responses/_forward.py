"""One sequence through a model of transformers: the states that the head reads, and the logits that it gives."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from assay.errors import ModelError, OutOfMemory, is_out_of_memory, not_finite
from assay.models import Model, head_of
from assay.models.wide import wide_products


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
        self._head = head_of(model.module)
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
            with wide_products(self.model):
                output = self.model.module(
                    input_ids=torch.tensor([list(ids)], device=self.model.device),
                    past_key_values=self._cache,
                    use_cache=True,
                    logits_to_keep=last,
                )
            self._cache = output.past_key_values
        except Exception as error:  # every architecture fails in its own way
            raise explained(self.model, error, on=f"a prompt of {len(ids)} tokens", cached=True) from error
        finally:
            hook.remove()
        rows = slice(-last, None) if last else slice(None)  # some architectures return all of them
        logits_TV, hidden_TD = output.logits[0, rows].float(), states[-1][0, rows].float()
        check_finite(self.model, hidden_TD, logits_TV)
        return logits_TV, hidden_TD


def explained(model: Model, error: Exception, *, on: str, cached: bool) -> ModelError | OutOfMemory:
    """Return the error that explains why a forward pass failed.

    Args:
        model: Model that ran.
        error: Error that it ended with.
        on: Words for what it ran on.
        cached: Whether the model read one request with a cache, or a batch without.
    """
    if is_out_of_memory(error):
        return OutOfMemory(
            f"the device ran out of memory on {on}",
            wanted=f"room for the activations {'and the cache of one request' if cached else 'of one batch'}",
            do=f"use {'shorter prompts, or a smaller dtype' if cached else 'a smaller --batch-size or dtype'}",
        )
    return ModelError(
        f"{model.reference} ({model.architecture}) does not run: {type(error).__name__}: {error}",
        wanted=f"a decoder that takes tokens{' and a cache of keys and values' if cached else ''}",
        do="use another architecture, such as Llama, Qwen3 or Mistral",
    )


def check_finite(model: Model, hidden_TD: Tensor, logits_TV: Tensor) -> None:
    """Refuse what a forward pass gave if a state is NaN or infinite, or a logit is NaN or beyond the largest number.

    Raises:
        BadWeights: It is.
    """
    bad = torch.isnan(logits_TV) | (logits_TV == torch.inf)
    if not bool(torch.isfinite(hidden_TD).all()) or bool(bad.any()):
        seen = f"{model.reference} gives NaN or infinity in {model.dtype}"
        raise not_finite(seen, wanted="finite hidden states and logits")
