"""Read the pipes of a process with bounds, and feed it."""

import os
import selectors
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO

__all__ = ["Pumped", "pump"]

_CHUNK = 65536


@dataclass(frozen=True, slots=True)
class Pumped:
    """What came out of the pipes, whether the time ran out, and whether a pipe held more than its bound."""

    output: dict[str, bytes]
    timed_out: bool
    overflowed: bool


def pump(
    pipes: Mapping[str, tuple[int, int]], deadline: float, *, feed: tuple[IO[bytes], bytes] | None = None
) -> Pumped:
    """Read every pipe to its end, or until the deadline or an overflow.

    Args:
        pipes: name to (descriptor, bound in bytes).
        deadline: of `time.monotonic`.
        feed: a pipe to write to meanwhile, and the bytes for it; it is closed after them.
    """
    output = {name: bytearray() for name in pipes}
    timed_out = overflowed = False
    with selectors.DefaultSelector() as selector:
        for name, (descriptor, _) in pipes.items():
            selector.register(descriptor, selectors.EVENT_READ, name)
        pending = memoryview(b"")
        if feed is not None:
            os.set_blocking(feed[0].fileno(), False)
            selector.register(feed[0], selectors.EVENT_WRITE, None)
            pending = memoryview(feed[1])
        while selector.get_map() and not overflowed:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if timed_out := time.monotonic() >= deadline:
                break
            for key, _ in ready:
                if key.data is not None:
                    overflowed |= _drain(selector, key.fd, output[key.data], pipes[key.data][1])
                elif feed is not None:
                    pending = _feed(selector, feed[0], pending)
    return Pumped({name: bytes(read) for name, read in output.items()}, timed_out, overflowed)


def _feed(selector: selectors.BaseSelector, stdin: IO[bytes], pending: memoryview) -> memoryview:
    try:
        pending = pending[os.write(stdin.fileno(), pending[:_CHUNK]) :]
    except BrokenPipeError:
        pending = pending[:0]
    if not pending:
        selector.unregister(stdin)
        stdin.close()
    return pending


def _drain(selector: selectors.BaseSelector, descriptor: int, read: bytearray, bound: int) -> bool:
    """Read what is there; True if that is more than the bound, of which only the bound is kept."""
    chunk = os.read(descriptor, _CHUNK)
    if not chunk:
        selector.unregister(descriptor)
    read += chunk
    if len(read) <= bound:
        return False
    del read[bound:]
    return True
