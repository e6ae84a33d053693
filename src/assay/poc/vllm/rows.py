"""A worker's view of a vLLM step, and the rows of nonces that it holds until collected.

A row is what is read of the hidden states of a nonce. Request ids lead to the nonces. The names of
vLLM that are read are internal to it; :mod:`assay.poc.vllm.compatibility` refuses a version in
which one is missing.

Legend of shapes: T positions, D hidden size, S states, K numbers of a sketch.
"""

import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from assay.models.device import processor
from assay.models.frame import Frame
from assay.poc.protocol.pipelines import SKETCH_EVERY, SKETCH_SIZE, Pipeline
from assay.poc.protocol.round import Round
from assay.poc.protocol.transforms import sketch_states
from assay.poc.vllm.compatibility import rounded_cache, runner_kind, stored_as
from assay.streams.arrays import dtype_name

T = TypeVar("T")
MAX_STREAMS = 16
# bound on the rows of a stream; above it the oldest are dropped, whose requests were given up
MAX_ROWS = 4096
# The id of a nonce's request, to which vLLM adds a suffix.
REQUEST_ID = re.compile(r"(?P<key>assay-.*)\.(?P<nonce>[0-9]{1,16})(-[^.]*)?", re.DOTALL)
# Characters of the reason for which a nonce or a call did not run.
LONGEST_REASON = 300
# Numbers of projections that are made at once: vLLM leaves little of a GPU's memory free.
MOST_NORMALS = 2**22
# key of `extra_args` of a request that replays: the tokens or points that another node states
CLAIMED = "assay_claimed"


def new_key() -> str:
    """Return a random key for a new stream: clients may choose request ids on some routes."""
    return f"assay-{secrets.token_hex(16)}"


def request_id(key: str, nonce: int) -> str:
    """Return the id of the request of a nonce."""
    return f"{key}.{nonce}"


def split_id(text: str) -> tuple[str, int] | None:
    """Return key and nonce of a request id with vLLM's suffix; None for other requests."""
    match = REQUEST_ID.fullmatch(text)
    return match and (match["key"], int(match["nonce"]))


def pack_values(nonces: list[int], values: NDArray[Any]) -> dict[str, Any]:
    """Return values of nonces as they leave a worker, in plain types.

    That is ``nonces``; ``values``, their bytes; ``dtype``, float32 or float16; and ``shape``.
    """
    return {
        "nonces": nonces,
        "values": values.tobytes(),
        "dtype": str(values.dtype),
        "shape": list(values.shape),
    }


def unpack_values(reply: dict[str, Any]) -> dict[int, Any]:
    """Return the values of a reply by nonce: of :func:`pack_values`, or of a worker that has
    none.
    """
    if "values" not in reply:
        return {}
    values = np.frombuffer(reply["values"], dtype=reply["dtype"]).reshape(reply["shape"])
    return dict(zip(reply["nonces"], values, strict=True))


class Spec(NamedTuple):
    """What the nonces of a stream are computed for."""

    round: Round
    pipeline: Pipeline
    frame: Frame | None = None  # of the checkpoint, for a pipeline that has one


class Bounded(OrderedDict[int, T]):
    """Something by nonce. Of more than :data:`MAX_ROWS` entries the oldest are dropped."""

    dropped = 0  # number of entries

    @override
    def __setitem__(self, nonce: int, value: T) -> None:
        super().__setitem__(nonce, value)
        while len(self) > MAX_ROWS:
            self.popitem(last=False)
            self.dropped += 1


@dataclass(eq=False)
class RowStream:
    """The nonces of one caller: a round, or a validation in it.

    Only rows of nonces in ``filled`` are kept: their inputs are known to be those of the round, not
    placeholders. Its values are what is known so far of nonces that take several steps. A row must
    not be a view, which would keep all states of a step alive.
    """

    spec: Spec
    rows: Bounded[Tensor] = field(default_factory=Bounded)
    filled: Bounded[Any] = field(default_factory=Bounded)
    # Reasons of nonces that could not run.
    failed: Bounded[str] = field(default_factory=Bounded)

    def take(self, nonces: Sequence[int]) -> tuple[list[int], list[Tensor]]:
        """Remove and return the rows of those nonces that are there."""
        for nonce in nonces:
            self.filled.pop(nonce, None)
        present = [nonce for nonce in nonces if nonce in self.rows]
        return present, [self.rows.pop(nonce) for nonce in present]


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
            self._dropped += len(stream.rows) + stream.rows.dropped

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
            "dropped": self._dropped + sum(stream.rows.dropped for stream in streams),
            "failed": sum(len(stream.failed) for stream in streams),
        }


class Chunk(NamedTuple):
    """The tokens of one request in one step."""

    request_id: str  # as the worker knows it
    start: int  # row of the first token in the hidden states of the step
    length: int  # number of tokens in it
    computed: int  # number of tokens that were computed in earlier steps
    prompt: int  # number of tokens of the prompt

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


def read_step(runner: Any) -> tuple[Tensor, list[Chunk]] | None:
    """Return the step's hidden states [tokens, D] and requests; None on ranks without states.

    The runner of ``vllm/v1/worker/gpu/model_runner.py`` may have padded the batch behind
    ``num_reqs``.
    """
    # What both model runners keep between ``execute_model`` and ``sample_tokens``.
    state = runner.execute_model_state
    if state is None or not hasattr(state.hidden_states, "shape"):
        return None
    if runner_kind(runner) == "v1":
        return state.hidden_states, chunks_of(runner, state.scheduler_output.num_scheduled_tokens)
    batch = state.input_batch
    names = batch.req_ids[: batch.num_reqs]
    lengths = np.diff(batch.query_start_loc_np[: len(names) + 1]).tolist()
    counts = batch.num_computed_tokens_np, batch.prefill_len_np
    return state.hidden_states, _chunks(names, lengths, *counts)


def chunks_of(runner: Any, scheduled: Mapping[str, int]) -> list[Chunk]:
    """Return the requests of a step of the V1 runner, from the tokens scheduled of each."""
    batch = runner.input_batch
    lengths = [scheduled[name] for name in batch.req_ids]
    return _chunks(batch.req_ids, lengths, batch.num_computed_tokens_cpu, batch.num_prompt_tokens)


def _chunks(names: Sequence[str], lengths: list[int], *counts: NDArray[Any]) -> list[Chunk]:
    starts = accumulate(lengths, initial=0)
    columns = (numbers[: len(names)].tolist() for numbers in counts)
    return list(map(Chunk, names, starts, lengths, *columns))


def sketched_tokens(low: int, high: int) -> range:
    """Return the numbers of the tokens from ``low`` on, and before ``high``, that are sketched."""
    return range(-(-max(low, 0) // SKETCH_EVERY) * SKETCH_EVERY, high, SKETCH_EVERY)


def sketch_in_parts(states_SD: Tensor, seeds_S: NDArray[np.uint32]) -> Tensor:
    """Return what :func:`sketch_states` returns of states, [S, K], for a part of them at a time."""
    at_once = max(1, MOST_NORMALS // (SKETCH_SIZE * states_SD.shape[1]))
    parts = [slice(start, start + at_once) for start in range(0, len(seeds_S), at_once)]
    return torch.cat([sketch_states(states_SD[part], seeds_S[part]) for part in parts])


def place_inputs(request: Any, inputs_TD: Tensor) -> None:
    """Give a new request of vLLM its input embeddings, on the CPU, where vLLM expects them.

    V1 copies both into its InputBatch (``add_request``), V2 into ``model_states/prompt_embeds.py``:
    positions whose ``prompt_is_token_ids`` is False take their embedding from ``prompt_embeds``,
    not from the token.
    """
    request.prompt_embeds = inputs_TD.cpu()
    request.prompt_is_token_ids = [False] * len(inputs_TD)


def check_length(request: Any, positions: int) -> None:
    """Raise a ValueError for a request with inputs or placeholders of another length."""
    sent = request.prompt_embeds
    length = len(request.prompt_token_ids if sent is None else sent)
    if length != positions:
        raise ValueError(f"inputs or placeholders of {length} for {positions} positions")


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
