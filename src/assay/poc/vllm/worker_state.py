"""What is read of vLLM inside a worker: its place among the workers, its model, and the requests of a step.

Everything here is internal to vLLM; :mod:`._compatibility` refuses a version in which a name that is read is missing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay.models.device import processor
from assay.poc.vllm.compatibility import rounded_cache, runner_kind, stored_as
from assay.streams.backends import dtype_name

MAX_VALUES = 2**24
"""Number of input values that are made at once: vLLM leaves little of a GPU's memory free."""

MAX_SUMMED = 2**22
"""Number of state values that are summed at once; they are held three times in float32."""


@dataclass(frozen=True)
class Chunk:
    """The tokens of one request in one step.

    Args:
        request_id: Id of the request, as the worker knows it.
        start: Row of the first token in the hidden states of the step.
        length: Number of tokens.
        computed: Number of tokens of the request that were computed in earlier steps.
        prompt: Number of tokens of its prompt.
    """

    request_id: str
    start: int
    length: int
    computed: int
    prompt: int

    @property
    def in_prompt(self) -> int:
        """Number of the tokens that belong to the prompt; the others were generated."""
        return max(0, min(self.length, self.prompt - self.computed))

    @property
    def ends_prompt(self) -> bool:
        """Whether the last token of the prompt is in this step."""
        return self.computed < self.prompt <= self.computed + self.length


@dataclass(frozen=True)
class Spans:
    """The requests of a step, all at once: a loop over them costs as much as a small model's layers.

    Of the runner of ``vllm/v1/worker/gpu_model_runner.py`` they are in the order of ``req_ids``; in that of
    ``vllm/v1/worker/gpu/model_runner.py`` the batch may be padded behind ``num_reqs``.

    Args:
        names: Ids of the requests, as the worker knows them.
        starts: Row of the first token of each in the hidden states of the step.
        lengths: Number of tokens of each.
        computed: Number of tokens of each that were computed in earlier steps.
        prompts: Number of tokens of the prompt of each.
    """

    names: list[str]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    computed: NDArray[np.int64]
    prompts: NDArray[np.int64]


def spans(runner: Any) -> tuple[Tensor | None, Spans | None]:
    """Return the hidden states [tokens, D] of the step and its requests; None where this rank has no states."""
    # What both model runners keep between ``execute_model`` and ``sample_tokens``.
    state = runner.execute_model_state
    if state is None or not hasattr(state.hidden_states, "shape"):
        return None, None
    if runner_kind(runner) == "v2":
        batch = state.input_batch
        names = list(batch.req_ids[: batch.num_reqs])
        ends = np.asarray(batch.query_start_loc_np[: len(names) + 1], np.int64)
        computed, prompts = batch.num_computed_tokens_np, batch.prefill_len_np
    else:
        batch, scheduled = runner.input_batch, state.scheduler_output.num_scheduled_tokens
        names, computed, prompts = batch.req_ids, batch.num_computed_tokens_cpu, batch.num_prompt_tokens
        ends = np.cumsum([0, *(scheduled[name] for name in names)])
    counts = (np.asarray(numbers[: len(names)], np.int64) for numbers in (computed, prompts))
    return state.hidden_states, Spans(names, ends[:-1], np.diff(ends), *counts)


def chunks(runner: Any) -> tuple[Tensor | None, Iterator[Chunk]]:
    """Return what :func:`spans` does, request by request."""
    states_ND, step = spans(runner)
    if step is None:
        return None, iter(())
    columns = (numbers.tolist() for numbers in (step.starts, step.lengths, step.computed, step.prompts))
    return states_ND, map(Chunk, step.names, *columns)


def call_before(runner: Any, name: str, before: Callable[..., None], failed: Callable[[Exception], None]) -> None:
    """Wrap a method of a model runner, on the instance, so that ``before`` gets its arguments first.

    An exception that escaped would end the engine, and with it every chat: ``failed`` gets it instead.
    """
    original = getattr(runner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            before(*args, **kwargs)
        except Exception as error:
            failed(error)
        return original(*args, **kwargs)

    setattr(runner, name, wrapped)


def is_first_stage() -> bool:
    """Return whether this worker has the first layers."""
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().is_first_rank)


def is_last_stage() -> bool:
    """Return whether this worker has the last layers."""
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().is_last_rank)


def is_first_of_group() -> bool:
    """Return whether this worker answers for those that share its layers."""
    from vllm.distributed import get_tp_group

    return bool(get_tp_group().is_first_rank)


def describe(runner: Any, config: Any) -> dict[str, Any]:
    """Return what the fingerprint and the engine need to know about a worker, as plain values."""
    parallel, model = config.parallel_config, config.model_config
    groups = [group for outer in getattr(runner, "attn_groups", []) for group in outer]
    attention = sorted({str(group.backend.get_name()) for group in groups})
    return {
        "runner": runner_kind(runner),
        "device": processor(runner.device),
        "dtype": dtype_name(model.dtype),
        "threads": 0 if runner.device.type == "cuda" else torch.get_num_threads(),
        "attention": "+".join(attention) or "unknown",
        "hidden_size": int(model.get_hidden_size()),
        "vocab_size": int(model.get_vocab_size()),
        "num_layers": int(model.hf_text_config.num_hidden_layers),
        "tensor_parallel": int(parallel.tensor_parallel_size),
        "pipeline_parallel": int(parallel.pipeline_parallel_size),
        "experts_over": experts_over(parallel),
        "eager": bool(model.enforce_eager),
        "cache": rounded_cache(config),
        "format": stored_as(config),
        "products": products(runner.model),
    }


def experts_over(parallel: Any) -> list[str]:
    """Return how engines or workers share the experts of a mixture, where tensor parallelism does not say it.

    Args:
        parallel: vLLM's parallel configuration as a worker has it: an engine of a dense model, which steps by itself,
            has one data-parallel engine there.
    """
    engines = int(parallel.data_parallel_size)
    dealt = engines * int(parallel.tensor_parallel_size) if parallel.enable_expert_parallel else 1
    return [f"{word} {count}" for word, count in (("dp", engines), ("ep", dealt)) if count > 1]


def products(model: Any) -> list[str]:
    """Return which kernels of vLLM multiply in quantised layers and in experts: nothing for other models.

    Args:
        model: Model of vLLM in which a layer has a ``quant_method``, with a kernel or with a scheme that has one.
    """
    found = set()
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        owners = (getattr(layer, "scheme", None), method)
        kernels = [getattr(owner, name, None) for owner in owners for name in ("kernel", "fp8_linear")]
        experts = getattr(method, "experts_cls", None) or getattr(method, "unquantized_backend", None)
        for kernel in filter(None, kernels):
            way = getattr(getattr(kernel, "linear_method", None), "__name__", "").removeprefix("_apply_weights_")
            found.add(" ".join(filter(None, (type(kernel).__name__, way))))
        if experts is not None:
            found.add(f"experts {getattr(experts, '__name__', experts)}")
    return sorted(found)
