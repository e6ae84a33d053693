"""Run responses through a transformers model: whole ones at once, or token by token.

Sequences of a batch are filled up at their ends, which a decoder that only looks back does not see.
The head computes the positions that are asked for and no others.

Legend of shapes: B sequences, T positions, N tokens of all outputs, D hidden size, V logits, S
sketches of K numbers.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache
from typing_extensions import override

from assay.errors import ModelError, OutOfMemory, is_out_of_memory, not_finite
from assay.models.decoder import head_of
from assay.models.model import Model
from assay.models.precision import own_precision
from assay.models.shared_passes import check_cached, pass_kind, steps_of_passes
from assay.poc.engines.hf.engine import HFEngine
from assay.poc.protocol.checks import check_batch_size
from assay.poc.protocol.fingerprint import Fingerprint
from assay.poc.protocol.pipelines import SKETCH_EVERY
from assay.poc.protocol.transforms import sketch_states
from assay.poc.responses.adapters import Lora
from assay.poc.responses.sampling import step_seeds

SKETCHES_AT_ONCE = 64  # projections of 12 · D normals each
MOST_POSITIONS = 2**13  # of a batch, beside a single sequence that is longer
MOST_SCORES = 2**27  # logits of a batch: half a gigabyte


@dataclass(frozen=True)
class PromptAndOutput:
    """A response as it is run again."""

    prompt: tuple[int, ...]  # tokens of the prompt
    output: tuple[int, ...]  # tokens of the output; the last one is not run

    @property
    def positions(self) -> int:
        """Number of positions that are run."""
        return len(self.prompt) + len(self.output) - 1


@dataclass(frozen=True, eq=False)
class Prefilled:
    """Logits and hidden states that gave the tokens of one output."""

    logits: Float32[Tensor, "N V"]  # logits in front of every token of the output, [N, V]
    # hidden states that the head read for them, [N, D]; None where the engine does not show them
    # all
    hidden: Float32[Tensor, "N D"] | None
    sketched: Float32[Tensor, "S D"]  # hidden states of every 32nd token from the first, [S, D]
    # whether the engine gave the logits of the whole vocabulary; those that it did not give are
    # -inf
    whole: bool = True


class Prefill(Protocol):
    """An engine that runs whole responses."""

    @property
    def fingerprint(self) -> Fingerprint:
        """How the engine computes."""

    def run(
        self, responses: Sequence[PromptAndOutput], adapter: Lora | None = None
    ) -> Iterator[tuple[int, Prefilled]]:
        """Yield, in any order, the index of every response with the states or logits of its tokens.

        Raises:
            BadWeights: A state or a logit is NaN, or a state is infinite.
            OutOfMemory: The device ran out of memory.
            ModelError: The architecture cannot be run, or the adapter is one of another model.
            UsageError: The engine takes no adapter.
        """


class HFPrefill(Prefill):
    """Prefills with transformers, a number of sequences at once, or one for batch-invariant bits.

    Raises:
        UsageError: The batch size is out of range.
        ModelError: The model has no head that reads the last hidden state.
    """

    def __init__(self, model: Model, *, batch_size: int = 16) -> None:
        check_batch_size(batch_size)
        self.model = model
        self.batch_size = batch_size
        # Refuses a model without one before any response is read.
        head_of(model.module)

    @override
    @property
    def fingerprint(self) -> Fingerprint:
        return HFEngine(self.model, batch_size=self.batch_size, seq_len=1).fingerprint

    @override
    def run(
        self, responses: Sequence[PromptAndOutput], adapter: Lora | None = None
    ) -> Iterator[tuple[int, Prefilled]]:
        # Parts of every response, each of which one pass serves; what came before is its prompt.
        passes = [
            [
                PromptAndOutput(
                    response.prompt + response.output[: part.start],
                    response.output[part.start : part.stop],
                )
                for part in steps_of_passes(
                    self.model.config, len(response.prompt), len(response.output)
                )
            ]
            for response in responses
        ]
        kinds = [
            [pass_kind(self.model.config, part.positions) for part in parts] for parts in passes
        ]
        order = sorted(range(len(responses)), key=lambda index: -responses[index].positions)
        while order:
            alike = [index for index in order[: self.batch_size] if kinds[index] == kinds[order[0]]]
            batch = alike[: self._fitting([responses[index] for index in alike])]
            # A set, because files of receipts have up to a million.
            in_batch = set(batch)
            order = [index for index in order if index not in in_batch]
            with nullcontext() if adapter is None else adapter.on(self.model):
                outputs = [
                    self._run(rows)
                    for rows in zip(*(passes[index] for index in batch), strict=True)
                ]
            for index, parts in zip(batch, zip(*outputs, strict=True), strict=True):
                logits, hidden = (
                    part[0] if len(part) == 1 else torch.cat(part)
                    for part in zip(*parts, strict=True)
                )
                yield index, Prefilled(logits, hidden, hidden[::SKETCH_EVERY])

    def _fitting(self, responses: Sequence[PromptAndOutput]) -> int:
        """Return how many of these responses fit into a batch, at least one."""
        longest = responses[0].positions
        tokens = 0
        for count, response in enumerate(responses, start=1):
            tokens += len(response.output)
            if longest * count > MOST_POSITIONS or tokens * self.model.vocab_size > MOST_SCORES:
                return max(1, count - 1)
        return len(responses)

    @torch.inference_mode()
    def _run(self, responses: Sequence[PromptAndOutput]) -> list[tuple[Tensor, Tensor]]:
        """Return the logits [N, V] and the hidden states [N, D] of each response, by one pass."""
        longest = max(response.positions for response in responses)
        ids_BT = torch.zeros((len(responses), longest), dtype=torch.int64)
        rows: list[int] = []
        columns: list[int] = []
        for row, response in enumerate(responses):
            ids = [*response.prompt, *response.output[:-1]]
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            columns += range(len(response.prompt) - 1, len(ids))
            rows += [row] * len(response.output)
        logits_NV, hidden_ND, _ = _run_model(
            self.model, ids_BT, (rows, columns), on=f"{ids_BT.numel()} positions", use_cache=False
        )
        sizes = [len(response.output) for response in responses]
        return list(zip(torch.split(logits_NV, sizes), torch.split(hidden_ND, sizes), strict=True))


@torch.inference_mode()
def read_on(
    model: Model, ids: Sequence[int], cache: Any = None, *, cached: int = 0, last: int = 1
) -> tuple[Float32[Tensor, "N V"], Float32[Tensor, "N D"], Any]:
    """Append tokens to the one sequence of a cache, which has ``cached``, or to a new cache.

    Returns logits and hidden states of the last positions, or of all tokens appended when 0, and
    the cache; raises as :meth:`Prefill.run` does. An architecture with a cache of its own refuses
    that of transformers with a ModelError.
    """
    cache = DynamicCache(config=model.module.config) if cache is None else cache
    places = 0, slice(-last or None, None)
    return _run_model(
        model,
        torch.tensor([list(ids)]),
        places,
        on=f"a prompt of {len(ids)} tokens",
        past_key_values=cache,
        # As in generation: Bamba would begin again at 0.
        position_ids=torch.arange(cached, cached + len(ids), device=model.device)[None],
        use_cache=True,
    )


def _run_model(
    model: Model, ids_BT: Tensor, places: tuple[Any, Any], *, on: str, **options: Any
) -> tuple[Float32[Tensor, "N V"], Float32[Tensor, "N D"], Any]:
    """Return logits and hidden states at some rows and columns of a batch, and the cache of the
    model.
    """
    states: list[Tensor] = []

    def keep_places(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states.append(inputs[0][places])
        return states[-1][None], *inputs[1:]

    hook = head_of(model.module).register_forward_pre_hook(keep_places)
    try:
        with own_precision(model):
            output = model.module(input_ids=ids_BT.to(model.device), **options)
        logits_NV = output.logits[0].float()
        hidden_ND = states[-1].float()
    except Exception as error:  # every architecture fails in its own way
        if is_out_of_memory(error):
            raise OutOfMemory(
                f"the device ran out of memory on {on}",
                wanted="room for the activations and the keys and values of one batch",
                do="use a smaller --batch-size, shorter prompts or a smaller dtype",
            ) from error
        raise ModelError(
            f"{model.reference} ({model.architecture}) does not run: {type(error).__name__}: "
            f"{error}",
            wanted="a decoder that takes tokens, and a cache of keys and values",
            do="use another architecture, such as Llama, Qwen3 or Mistral",
        ) from error
    finally:
        hook.remove()
    check_finite(model, hidden_ND, logits_NV)
    if options["use_cache"]:
        check_cached(model.reference, output)
    return logits_NV, hidden_ND, getattr(output, "past_key_values", None)


def check_finite(model: Model, hidden_ND: Tensor, logits_NV: Tensor) -> None:
    """Refuse NaN or infinite states, and NaN or plus infinity in logits, with BadWeights."""
    bad_NV = torch.isnan(logits_NV) | (logits_NV == torch.inf)
    if not bool(torch.isfinite(hidden_ND).all()) or bool(bad_NV.any()):
        raise not_finite(
            f"{model.reference} gives NaN or infinity in {model.dtype}",
            wanted="finite hidden states and logits",
        )


def sketch_response(
    hidden_SD: Float[Tensor, "S D"], words: NDArray[np.uint32], steps: Sequence[int]
) -> Float16[Tensor, "S K"]:
    """Return the sketches of the final states of some steps, on their device.

    ``words`` are those of the response's seed for the stream ``sketch``, uint32 [8]. The states are
    finite, as :func:`check_finite` has found.
    """
    seeds_S = step_seeds(words, steps)
    spans = [
        slice(start, start + SKETCHES_AT_ONCE)
        for start in range(0, max(1, len(seeds_S)), SKETCHES_AT_ONCE)
    ]
    with own_precision(hidden_SD):
        return torch.cat([sketch_states(hidden_SD[span], seeds_S[span]) for span in spans])
