"""The rows that a worker holds between forward pass and collection, the request ids that lead to them, and its replies.

A row is what is read of the hidden states of a nonce.

Legend of shapes: T positions of a nonce, N tokens that it decodes, W numbers that are kept of these, D hidden size.
"""

import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, UInt32
from numpy.typing import NDArray
from torch import Tensor

from assay.errors import reason_of
from assay.poc.engines.outputs import Landing
from assay.poc.protocol.pipelines import Pipeline
from assay.poc.protocol.round import Round

log = logging.getLogger("assay.vllm")

MAX_STREAMS = 16
MAX_ROWS = 4096
"""Bound on the rows of a stream; above it the oldest are dropped, whose requests were given up."""

LONGEST_REASON = 300
"""Characters of the reason for which a nonce or a call did not run."""

EXPIRY = 600.0  # seconds without use after which a stream is dropped


def new_key() -> str:
    """Return the key of a new stream. It cannot be guessed: clients may choose request ids on some routes."""
    return f"assay-{secrets.token_hex(16)}"


def request_id(key: str, nonce: int) -> str:
    """Return the id of the request of a nonce."""
    return f"{key}.{nonce}"


def split_id(text: str) -> tuple[str, int] | None:
    """Return key and nonce of a request id as a worker sees it, with the suffix that vLLM appends; None for others."""
    key, _, rest = text.rpartition(".")
    digits = rest.partition("-")[0]
    if not key.startswith("assay-") or not (digits.isascii() and digits.isdigit() and len(digits) <= 16):
        return None
    return key, int(digits)


def packed(nonces: list[int], values: NDArray[Any]) -> dict[str, Any]:
    """Return values of nonces as they leave a worker, in plain types.

    That is ``nonces``; ``values``, their bytes; ``dtype``, float32 or float16; and ``width``, the numbers of each, or 0
    for distances.
    """
    width = values.shape[1] if values.ndim > 1 else 0
    return {"nonces": nonces, "values": values.tobytes(), "dtype": str(values.dtype), "width": width}


def unpacked(reply: dict[str, Any]) -> dict[int, Any]:
    """Return the values of a reply by nonce: of :func:`packed`, or of a worker that has none."""
    if "values" not in reply:
        return {}
    width, values = reply["width"], np.frombuffer(reply["values"], dtype=reply["dtype"])
    rows = values.reshape(len(reply["nonces"]), width) if width else values
    return dict(zip(reply["nonces"], rows, strict=True))


@dataclass(frozen=True)
class Begun:
    """A call that is queued, or why it is not.

    Args:
        call: Name of the call.
        nonces: Nonces of this engine.
        values: What is published of them; None where this worker does not answer.
        clock: Time that the device takes for them.
        error: Reason for which they do not run.
    """

    call: str
    nonces: list[int] = field(default_factory=list)
    values: Landing | None = None
    clock: "Clock | None" = None
    error: str | None = None

    def reply(self) -> dict[str, Any]:
        """Wait for the values, and return them as :meth:`DirectMethods.assay_pass` does."""
        error, found = self.error, {}
        if self.values is not None:
            try:
                found = packed(self.nonces, self.values.numpy())
                found["seconds"] = self.clock.seconds() if self.clock else 0.0
            except Exception as raised:
                error = noted(raised)
        return {"call": self.call, **found} if error is None else {"call": self.call, "error": error}


class Clock:
    """Measures the time in which a device works on what is queued until :meth:`stop`, without waiting for it.

    Args:
        device: Device whose current stream gets the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._events: list[Any] = []
        self._seconds = -time.perf_counter()
        if self._on_cuda:
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            self._events[0].record()

    def stop(self) -> None:
        """Take the end of the work; a CPU has done it by now."""
        self._seconds += time.perf_counter()
        if self._on_cuda:
            self._events[1].record()

    def seconds(self) -> float:
        """Wait for the end, and return the time of the device."""
        if not self._on_cuda:
            return self._seconds
        self._events[1].synchronize()
        return float(self._events[0].elapsed_time(self._events[1])) / 1e3


def noted(error: Exception) -> str:
    """Return an error in words, which are reported so that the engine lives."""
    log.warning("a batch of nonces did not run", exc_info=error)
    return reason_of(error)[:LONGEST_REASON]


class Spec(NamedTuple):
    """What the nonces of a stream are computed for."""

    round: Round
    pipeline: Pipeline


@dataclass(frozen=True, eq=False)
class Decode:
    """A nonce that decodes, or whose tokens are replayed, while its request runs.

    Args:
        noise: Seeds of the noise of its tokens.
        claimed: Tokens that are replayed, int64 [N]; None where they are decoded.
        kept: States and margins that are known so far; NaN where they are not.
    """

    noise: UInt32[np.ndarray, " N"]
    claimed: Tensor | None
    kept: Float32[Tensor, " W"]


@dataclass(eq=False)
class RowStream:
    """The nonces of one caller: a round, or a validation in it."""

    spec: Spec
    touched: float
    rows: "OrderedDict[int, Tensor]" = field(default_factory=OrderedDict)
    filled: "OrderedDict[int, None]" = field(default_factory=OrderedDict)
    """Nonces whose inputs are known to be those of the round, not placeholders: only their rows are kept."""

    sums: dict[int, Tensor] = field(default_factory=dict)
    """Weighted sums over the positions so far, of nonces whose prompt came in several steps."""

    decodes: dict[int, Decode] = field(default_factory=dict)
    """What is known of nonces that decode, until they are collected."""

    failed: "OrderedDict[int, str]" = field(default_factory=OrderedDict)
    """Reasons of nonces that could not run."""

    dropped: int = 0
    """Number of rows that were never collected."""

    def fill(self, nonce: int) -> None:
        """Note that the inputs of a nonce are those of its round."""
        self.touched = time.monotonic()
        self.filled[nonce] = None
        while len(self.filled) > MAX_ROWS:
            self._forget(self.filled.popitem(last=False)[0])

    def fail(self, nonce: int, reason: str) -> None:
        """Keep the reason for which a nonce could not run."""
        self.failed[nonce] = reason
        while len(self.failed) > MAX_ROWS:
            self.failed.popitem(last=False)

    def put(self, nonce: int, row_D: Tensor) -> None:
        """Keep the row of a nonce. It must not be a view, which would keep all states of a step alive."""
        self.rows[nonce] = row_D
        while len(self.rows) > MAX_ROWS:
            self.rows.popitem(last=False)
            self.dropped += 1

    def take(self, nonces: Iterable[int]) -> tuple[list[int], list[Tensor]]:
        """Remove and return the rows of those nonces that are there."""
        self.touched = time.monotonic()
        found: list[int] = []
        for nonce in nonces:
            self.filled.pop(nonce, None)
            self._forget(nonce)
            if nonce in self.rows:
                found.append(nonce)
        return found, [self.rows.pop(nonce) for nonce in found]

    def _forget(self, nonce: int) -> None:
        self.sums.pop(nonce, None)
        self.decodes.pop(nonce, None)


class Rows:
    """Bounded store of streams and their rows."""

    def __init__(self) -> None:
        self._streams: dict[str, RowStream] = {}
        self._dropped = 0

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, key: str, spec: Spec) -> None:
        """Begin a stream. Streams that were not used for ten minutes end, and the oldest if there are too many."""
        now = time.monotonic()
        self._streams[key] = RowStream(spec, now)
        by_age = sorted(self._streams, key=lambda name: self._streams[name].touched)
        expired = [name for name in by_age if self._streams[name].touched < now - EXPIRY]
        for name in {*expired, *by_age[: max(0, len(by_age) - MAX_STREAMS)]}:
            self.close(name)

    def close(self, key: str) -> None:
        """End a stream, and drop its rows."""
        stream = self._streams.pop(key, None)
        if stream is not None:
            self._dropped += len(stream.rows) + stream.dropped

    def get(self, key: str) -> RowStream | None:
        """Return the stream of a key, or None."""
        return self._streams.get(key)

    def find(self, request: str) -> tuple[RowStream, int] | None:
        """Return the stream and the nonce of a request id, or None for requests of clients."""
        key, nonce = split_id(request) or ("", 0)
        stream = self._streams.get(key)
        return None if stream is None else (stream, nonce)

    def counts(self) -> dict[str, int]:
        """Return how many streams, rows, marks and failures are held, and how many rows were dropped."""
        streams = list(self._streams.values())
        return {
            "streams": len(streams),
            "rows": sum(len(stream.rows) for stream in streams),
            "filled": sum(len(stream.filled) for stream in streams),
            "dropped": self._dropped + sum(stream.dropped for stream in streams),
            "failed": sum(len(stream.failed) for stream in streams),
        }
