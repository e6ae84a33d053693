"""Prefills: whole responses through a model at once, and what gave their tokens.

Sequences of a batch are filled up at their ends, which a decoder that looks back only does not see. The head is given
the positions that are asked for and no others.

Legend of shapes: B sequences, T positions, N tokens of all outputs, D hidden size, V logits.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from assay.errors import ModelError, OutOfMemory, is_out_of_memory, not_finite
from assay.models.decoder import head_of
from assay.models.load import Model
from assay.models.wide import wide_products
from assay.poc.engines.hf.engine import HFEngine
from assay.poc.protocol.pipelines import SKETCH_EVERY
from assay.poc.protocol.record import Fingerprint
from assay.poc.responses.adapters import Lora

# --------------------------------------------------------------------------------------------------
# One sequence through a model of transformers: the states that the head reads, and the logits that it gives.


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


MOST_POSITIONS = 2**13  # of a batch, beside a single sequence that is longer
MOST_SCORES = 2**27  # logits of a batch: half a gigabyte


@dataclass(frozen=True)
class Whole:
    """A response as it is run again.

    Args:
        prompt: Tokens of the prompt.
        output: Tokens of the output; the last one is not run.
    """

    prompt: tuple[int, ...]
    output: tuple[int, ...]

    @property
    def positions(self) -> int:
        """Number of positions that are run."""
        return len(self.prompt) + len(self.output) - 1


@dataclass(frozen=True, eq=False)
class Prefilled:
    """What gave the tokens of one output.

    Args:
        logits: Logits in front of every token of the output, [N, V].
        hidden: Hidden states that the head read for them, [N, D]; None where the engine does not show them all.
        sketched: Those of the tokens that are sketched, every 32nd from the first.
        whole: Whether there is a logit of every token; those that an engine did not give are -inf.
    """

    logits: Float32[Tensor, "N V"]
    hidden: Float32[Tensor, "N D"] | None
    sketched: Float32[Tensor, "S D"]
    whole: bool = True


class Prefill(Protocol):
    """An engine that runs whole responses."""

    @property
    def fingerprint(self) -> Fingerprint:
        """How the engine computes."""

    def run(self, responses: Sequence[Whole], adapter: Lora | None = None) -> Iterator[tuple[int, Prefilled]]:
        """Yield the index of every response with what gave its tokens, in any order, of the model or an adapter."""


class HFPrefill:
    """Prefills with the transformers engine.

    Args:
        model: Model of the verifier.
        batch_size: Number of sequences of a batch at most; one by one where bits must not depend on the others.

    Raises:
        ModelError: The model has no head that reads the last hidden state.
    """

    def __init__(self, model: Model, *, batch_size: int = 16) -> None:
        self.model, self.batch_size = model, batch_size
        self._head = head_of(model.module)

    @property
    def fingerprint(self) -> Fingerprint:
        """How this engine computes."""
        return HFEngine(self.model, batch_size=self.batch_size, seq_len=1).fingerprint

    def run(self, responses: Sequence[Whole], adapter: Lora | None = None) -> Iterator[tuple[int, Prefilled]]:
        """Yield the index of every response with what gave its tokens: the longest ones first.

        Raises:
            BadWeights: A state or a logit is NaN, or a state is infinite.
            OutOfMemory: The device ran out of memory.
            ModelError: The architecture cannot be run, or the adapter is one of another model.
        """
        order = sorted(range(len(responses)), key=lambda index: -responses[index].positions)
        while order:
            batch = order[: self._fitting([responses[index] for index in order[: self.batch_size]])]
            order = order[len(batch) :]
            with nullcontext() if adapter is None else adapter.on(self.model):
                made = self._run([responses[index] for index in batch])
            yield from zip(batch, made, strict=True)

    def _fitting(self, responses: Sequence[Whole]) -> int:
        """Return how many of these responses fit into a batch, at least one."""
        longest = responses[0].positions
        tokens = 0
        for count, response in enumerate(responses, start=1):
            tokens += len(response.output)
            if longest * count > MOST_POSITIONS or tokens * self.model.vocab_size > MOST_SCORES:
                return max(1, count - 1)
        return len(responses)

    @torch.inference_mode()
    def _run(self, responses: Sequence[Whole]) -> list[Prefilled]:
        longest = max(response.positions for response in responses)
        ids_BT = torch.zeros((len(responses), longest), dtype=torch.int64)
        rows: list[int] = []
        columns: list[int] = []
        for row, response in enumerate(responses):
            ids = [*response.prompt, *response.output[:-1]]
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            columns += range(len(response.prompt) - 1, len(ids))
            rows += [row] * len(response.output)
        states: list[Tensor] = []

        def only_outputs(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            states.append(inputs[0][rows, columns])
            return states[-1][None], *inputs[1:]

        hook = self._head.register_forward_pre_hook(only_outputs)
        try:
            with wide_products(self.model):
                output = self.model.module(input_ids=ids_BT.to(self.model.device), use_cache=False)
            logits_NV, hidden_ND = output.logits[0].float(), states[-1].float()
        except Exception as error:  # every architecture fails in its own way
            raise explained(self.model, error, on=f"{ids_BT.numel()} positions", cached=False) from error
        finally:
            hook.remove()
        check_finite(self.model, hidden_ND, logits_NV)
        sizes = [len(response.output) for response in responses]
        parts = zip(torch.split(logits_NV, sizes), torch.split(hidden_ND, sizes), strict=True)
        return [Prefilled(logits, hidden, hidden[::SKETCH_EVERY]) for logits, hidden in parts]
