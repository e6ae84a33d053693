"""A worker's view of a vLLM step, and the rows of nonces that it holds until collected.

A row is what is read of the hidden states of a nonce. Request ids lead to the nonces. The names of
vLLM that are read are internal to it; :mod:`assay.poc.vllm.compatibility` refuses a version in
which one is missing.

Legend of shapes: D hidden size.
"""

import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay.models.device import processor
from assay.models.frame import Frame
from assay.poc.protocol.pipelines import Pipeline
from assay.poc.protocol.round import Round
from assay.poc.vllm.compatibility import rounded_cache, runner_kind, stored_as
from assay.streams.arrays import dtype_name

MAX_STREAMS = 16
# bound on the rows of a stream; above it the oldest are dropped, whose requests were given up
MAX_ROWS = 4096
# Characters of the reason for which a nonce or a call did not run.
LONGEST_REASON = 300
# Number of input values that are made at once: vLLM leaves little of a GPU's memory free.
MAX_VALUES = 2**24
# key of `extra_args` of a request that replays: the tokens or points that another node states
CLAIMED = "assay_claimed"
# Number of state values that are summed at once; they are held three times in float32.
MAX_SUMMED = 2**23


def new_key() -> str:
    """Return a random key for a new stream: clients may choose request ids on some routes."""
    return f"assay-{secrets.token_hex(16)}"


def request_id(key: str, nonce: int) -> str:
    """Return the id of the request of a nonce."""
    return f"{key}.{nonce}"


def split_id(text: str) -> tuple[str, int] | None:
    """Return key and nonce of a request id with vLLM's suffix; None for other requests."""
    key, _, number = text.rpartition(".")
    digits = number.partition("-")[0]
    if not key.startswith("assay-") or not (
        digits.isascii() and digits.isdigit() and len(digits) <= 16
    ):
        return None
    return key, int(digits)


def pack_values(nonces: list[int], values: NDArray[Any]) -> dict[str, Any]:
    """Return values of nonces as they leave a worker, in plain types.

    That is ``nonces``; ``values``, their bytes; ``dtype``, float32 or float16; and ``width``, the
    numbers of each, or 0 for distances.
    """
    width = values.shape[1] if values.ndim > 1 else 0
    return {
        "nonces": nonces,
        "values": values.tobytes(),
        "dtype": str(values.dtype),
        "width": width,
    }


def unpack_values(reply: dict[str, Any]) -> dict[int, Any]:
    """Return the values of a reply by nonce: of :func:`pack_values`, or of a worker that has
    none.
    """
    if "values" not in reply:
        return {}
    width = reply["width"]
    values = np.frombuffer(reply["values"], dtype=reply["dtype"])
    rows = values.reshape(len(reply["nonces"]), width) if width else values
    return dict(zip(reply["nonces"], rows, strict=True))


class Spec(NamedTuple):
    """What the nonces of a stream are computed for."""

    round: Round
    pipeline: Pipeline
    frame: Frame | None = None  # of the checkpoint, for a pipeline that has one


@dataclass(eq=False)
class RowStream:
    """The nonces of one caller: a round, or a validation in it."""

    spec: Spec
    rows: "OrderedDict[int, Tensor]" = field(default_factory=OrderedDict)
    # Nonces whose inputs are known to be those of the round, not placeholders: only their rows are
    # kept.
    filled: "OrderedDict[int, None]" = field(default_factory=OrderedDict)
    # Sums or states of prompts that come in several steps.
    parts: dict[int, Tensor] = field(default_factory=dict)
    # Of nonces of several steps, what runs them knows so far, until they are collected.
    decodes: dict[int, Any] = field(default_factory=dict)
    # Reasons of nonces that could not run.
    failed: "OrderedDict[int, str]" = field(default_factory=OrderedDict)
    dropped: int = 0  # number of rows that were never collected

    def fill(self, nonce: int) -> None:
        """Note that the inputs of a nonce are those of its round."""
        self.filled[nonce] = None
        while len(self.filled) > MAX_ROWS:
            self._forget(self.filled.popitem(last=False)[0])

    def fail(self, nonce: int, reason: str) -> None:
        """Keep the reason for which a nonce could not run."""
        self.failed[nonce] = reason
        while len(self.failed) > MAX_ROWS:
            self.failed.popitem(last=False)

    def put(self, nonce: int, row_D: Tensor) -> None:
        """Keep the row of a nonce. It must not be a view, which would keep all states of a step
        alive.
        """
        self.rows[nonce] = row_D
        while len(self.rows) > MAX_ROWS:
            self.rows.popitem(last=False)
            self.dropped += 1

    def take(self, nonces: Sequence[int]) -> tuple[list[int], list[Tensor]]:
        """Remove and return the rows of those nonces that are there."""
        for nonce in nonces:
            self.filled.pop(nonce, None)
            self._forget(nonce)
        present = [nonce for nonce in nonces if nonce in self.rows]
        return present, [self.rows.pop(nonce) for nonce in present]

    def _forget(self, nonce: int) -> None:
        self.parts.pop(nonce, None)
        self.decodes.pop(nonce, None)


class Rows:
    """Bounded store of streams and their rows."""

    def __init__(self) -> None:
        self._streams: dict[str, RowStream] = {}
        self._dropped = 0

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, key: str, spec: Spec) -> None:
        """Begin a stream. If there are too many, those end that were not used for the longest
        time.
        """
        self._streams[key] = RowStream(spec)
        for name in list(self._streams)[:-MAX_STREAMS]:
            self.close(name)

    def close(self, key: str) -> None:
        """End a stream, and drop its rows."""
        if (stream := self._streams.pop(key, None)) is not None:
            self._dropped += len(stream.rows) + stream.dropped

    def get(self, key: str) -> RowStream | None:
        """Return the stream of a key, which is used now, or None."""
        if key in self._streams:
            self._streams[key] = self._streams.pop(key)  # the last one in their order
        return self._streams.get(key)

    def find(self, request: str) -> tuple[RowStream, int] | None:
        """Return the stream and the nonce of a request id, or None for requests of clients."""
        key, nonce = split_id(request) or ("", 0)
        stream = self._streams.get(key)
        return None if stream is None else (stream, nonce)

    def counts(self) -> dict[str, int]:
        """Return how many streams, rows, marks and failures are held, and how many rows were
        dropped.
        """
        streams = list(self._streams.values())
        return {
            "streams": len(streams),
            "rows": sum(len(stream.rows) for stream in streams),
            "filled": sum(len(stream.filled) for stream in streams),
            "dropped": self._dropped + sum(stream.dropped for stream in streams),
            "failed": sum(len(stream.failed) for stream in streams),
        }


class Chunk(NamedTuple):
    """The tokens of one request in one step, a column of :class:`Spans`."""

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


class StepRow(NamedTuple):
    """A nonce in a step: its stream, its row of logits, and its tokens."""

    stream: RowStream
    nonce: int
    row: int
    chunk: Chunk


@dataclass(frozen=True)
class Spans:
    """The requests of a step as arrays: a loop would cost as much as a small model's layers.

    Of the runner of ``vllm/v1/worker/gpu_model_runner.py`` they are in the order of ``req_ids``; in
    that of ``vllm/v1/worker/gpu/model_runner.py`` the batch may be padded behind ``num_reqs``.
    """

    names: list[str]  # ids of the requests, as the worker knows them
    starts: NDArray[np.int64]  # rows of their first tokens in the hidden states of the step
    lengths: NDArray[np.int64]  # numbers of their tokens in it
    computed: NDArray[np.int64]  # numbers of their tokens that were computed in earlier steps
    prompts: NDArray[np.int64]  # numbers of the tokens of their prompts

    def chunks(self) -> Iterator[Chunk]:
        """Return them request by request."""
        columns = (
            numbers.tolist() for numbers in (self.starts, self.lengths, self.computed, self.prompts)
        )
        return map(Chunk, self.names, *columns)


def spans(runner: Any) -> tuple[Tensor, Spans] | None:
    """Return the step's hidden states [tokens, D] and requests; None on ranks without states."""
    # What both model runners keep between ``execute_model`` and ``sample_tokens``.
    state = runner.execute_model_state
    if state is None or not hasattr(state.hidden_states, "shape"):
        return None
    if runner_kind(runner) == "v2":
        batch = state.input_batch
        names = list(batch.req_ids[: batch.num_reqs])
        ends = np.asarray(batch.query_start_loc_np[: len(names) + 1], np.int64)
        return state.hidden_states, _spans_of(
            names, ends, batch.num_computed_tokens_np, batch.prefill_len_np
        )
    return state.hidden_states, step_spans(runner, state.scheduler_output.num_scheduled_tokens)


def step_spans(runner: Any, scheduled: Mapping[str, int]) -> Spans:
    """Return the requests of a step of the V1 runner, from the tokens scheduled of each."""
    batch = runner.input_batch
    ends = np.cumsum([0, *(scheduled[name] for name in batch.req_ids)])
    return _spans_of(batch.req_ids, ends, batch.num_computed_tokens_cpu, batch.num_prompt_tokens)


def _spans_of(names: list[str], ends: NDArray[np.int64], *counts: NDArray[Any]) -> Spans:
    computed, prompts = (np.asarray(numbers[: len(names)], np.int64) for numbers in counts)
    return Spans(names, ends[:-1], np.diff(ends), computed, prompts)


def call_before(runner: Any, name: str, before: Callable[..., None], owner: Any) -> None:
    """Wrap a model runner's method so that ``before`` gets its arguments first.

    An exception that escaped would end the engine, and with it every chat: ``owner.errors`` counts
    it instead.
    """
    original = getattr(runner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            before(*args, **kwargs)
        except Exception:
            owner.errors += 1
        return original(*args, **kwargs)

    setattr(runner, name, wrapped)


def is_first_stage() -> bool:
    """Return whether this worker has the first layers."""
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().is_first_rank)


def is_first_of_group() -> bool:
    """Return whether this worker answers for those that share its layers."""
    from vllm.distributed import get_tp_group

    return bool(get_tp_group().is_first_rank)


def describe(runner: Any, config: Any) -> dict[str, Any]:
    """Return what the fingerprint and the engine need to know about a worker, as plain values."""
    parallel = config.parallel_config
    model = config.model_config
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
    """Return how engines or workers share a mixture's experts, beyond tensor parallelism.

    In a worker's configuration an engine of a dense model, which steps by itself, has one
    data-parallel engine.
    """
    engines = int(parallel.data_parallel_size)
    dealt = engines * int(parallel.tensor_parallel_size) if parallel.enable_expert_parallel else 1
    return [f"{word} {count}" for word, count in (("dp", engines), ("ep", dealt)) if count > 1]


def products(model: Any) -> list[str]:
    """Return the kernels of quantised layers and experts; empty for other models.

    Such a layer has a ``quant_method``, with a kernel or with a scheme that has one.
    """
    names = set()
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        owners = (getattr(layer, "scheme", None), method)
        kernels = [
            getattr(owner, name, None) for owner in owners for name in ("kernel", "fp8_linear")
        ]
        experts = getattr(method, "experts_cls", None) or getattr(
            method, "unquantized_backend", None
        )
        for kernel in filter(None, kernels):
            variant = getattr(getattr(kernel, "linear_method", None), "__name__", "").removeprefix(
                "_apply_weights_"
            )
            names.add(" ".join(filter(None, (type(kernel).__name__, variant))))
        if experts is not None:
            names.add(f"experts {getattr(experts, '__name__', experts)}")
    return sorted(names)
