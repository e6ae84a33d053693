"""How a step of vLLM's two model runners is read: which requests are in it, and where their tokens are.

Both keep what a step left in ``execute_model_state`` until ``sample_tokens``. :mod:`._compatibility`
refuses a version in which one of the attributes read here is missing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Chunk", "chunks", "runner_kind"]


@dataclass(frozen=True)
class Chunk:
    """The tokens of one request in one step.

    Args:
        request_id: as the worker knows it.
        start: where they begin in the hidden states of the step.
        length: how many they are.
        computed: how many tokens of the request came in earlier steps.
        prompt: how many tokens its prompt has.
    """

    request_id: str
    start: int
    length: int
    computed: int
    prompt: int

    @property
    def in_prompt(self) -> int:
        """How many of the tokens are of the prompt; the others were generated."""
        return max(0, min(self.length, self.prompt - self.computed))

    @property
    def ends_prompt(self) -> bool:
        """Whether the last token of the prompt is in this step."""
        return self.computed < self.prompt <= self.computed + self.length


def runner_kind(runner: Any) -> str:
    """Return ``v2`` for the model runner of vllm/v1/worker/gpu, ``v1`` for the older one."""
    modules = {base.__module__ for base in type(runner).__mro__}
    return "v2" if any(module.startswith("vllm.v1.worker.gpu.") for module in modules) else "v1"


def chunks(runner: Any) -> tuple[Tensor | None, Iterator[Chunk]]:
    """Return the hidden states [tokens, D] of the step and its requests; None where this rank has no states."""
    state = runner.execute_model_state
    if state is None or not hasattr(state.hidden_states, "shape"):
        return None, iter(())
    read = _chunks_v2 if runner_kind(runner) == "v2" else _chunks_v1
    return state.hidden_states, read(runner, state)


def _chunks_v1(runner: Any, state: Any) -> Iterator[Chunk]:
    batch, lengths = runner.input_batch, state.scheduler_output.num_scheduled_tokens
    start = 0
    for index, name in enumerate(batch.req_ids):
        length = int(lengths[name])
        yield Chunk(name, start, length, int(batch.num_computed_tokens_cpu[index]), int(batch.num_prompt_tokens[index]))
        start += length


def _chunks_v2(runner: Any, state: Any) -> Iterator[Chunk]:
    batch = state.input_batch
    for index, name in enumerate(batch.req_ids[: batch.num_reqs]):
        start, end = int(batch.query_start_loc_np[index]), int(batch.query_start_loc_np[index + 1])
        computed, prompt = int(batch.num_computed_tokens_np[index]), int(batch.prefill_len_np[index])
        yield Chunk(name, start, end - start, computed, prompt)
