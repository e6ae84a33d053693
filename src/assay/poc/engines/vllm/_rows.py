"""The rows that a worker holds: what is read of the hidden states, between forward pass and collection.

Legend of shapes: T positions of a nonce, D hidden size.
"""

import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from assay.poc.engines.vllm._wire import Spec

__all__ = ["MAX_ROWS", "MAX_STREAMS", "RowStream", "Rows"]

MAX_STREAMS = 16
MAX_ROWS = 4096
"""Bound on the rows of a stream; above it the oldest are dropped, whose requests were given up."""

EXPIRY = 600.0  # seconds without use after which a stream is dropped


@dataclass
class RowStream:
    """The nonces of one caller: a round, or a validation in it."""

    spec: Spec
    touched: float
    rows: "OrderedDict[int, Tensor]" = field(default_factory=OrderedDict)
    filled: "OrderedDict[int, None]" = field(default_factory=OrderedDict)
    """Nonces whose inputs are known to be those of the round, not placeholders."""

    sums: dict[int, Tensor] = field(default_factory=dict)
    """Weighted sums over the positions so far, of nonces whose prompt came in several steps."""


class Rows:
    """Bounded store of streams and their rows."""

    def __init__(self) -> None:
        self._streams: dict[str, RowStream] = {}
        self.dropped = 0
        """Number of rows that were never collected."""

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
            self.dropped += len(stream.rows)

    def get(self, key: str) -> RowStream | None:
        """Return the stream of a key, or None."""
        return self._streams.get(key)

    def mark_filled(self, key: str, nonce: int) -> None:
        """Note that the inputs of a nonce are those of its round."""
        stream = self._streams.get(key)
        if stream is not None:
            stream.filled[nonce] = None
            while len(stream.filled) > MAX_ROWS:
                stream.sums.pop(stream.filled.popitem(last=False)[0], None)

    def wants(self, key: str, nonce: int) -> bool:
        """Return whether to keep the row of a nonce."""
        stream = self._streams.get(key)
        return stream is not None and nonce in stream.filled

    def put(self, key: str, nonce: int, row_D: Tensor) -> None:
        """Keep the row of a nonce. It must not be a view, which would keep all states of a step alive."""
        stream = self._streams.get(key)
        if stream is None:
            return
        stream.rows[nonce] = row_D
        while len(stream.rows) > MAX_ROWS:
            stream.rows.popitem(last=False)
            self.dropped += 1

    def take(self, key: str, nonces: Iterable[int]) -> tuple[list[int], list[Tensor]]:
        """Remove and return the rows of those nonces that are there."""
        stream = self._streams.get(key)
        if stream is None:
            return [], []
        stream.touched = time.monotonic()
        found: list[int] = []
        rows: list[Tensor] = []
        for nonce in nonces:
            stream.filled.pop(nonce, None)
            stream.sums.pop(nonce, None)
            row = stream.rows.pop(nonce, None)
            if row is not None:
                found.append(nonce)
                rows.append(row)
        return found, rows

    def counts(self) -> dict[str, int]:
        """Return how many streams, rows and marks are held, and how many rows were dropped."""
        streams = list(self._streams.values())
        return {
            "streams": len(streams),
            "rows": sum(len(stream.rows) for stream in streams),
            "filled": sum(len(stream.filled) for stream in streams),
            "dropped": self.dropped,
        }
