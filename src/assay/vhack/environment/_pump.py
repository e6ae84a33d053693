"""Feed a process, read its pipes with bounds, and end it and everything it started."""

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
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
    process: "subprocess.Popen[bytes]", stdin: bytes, pipes: Mapping[str, tuple[int, int]], seconds: float
) -> Pumped:
    """Write ``stdin``, read every pipe to its end, and kill the process group at the time limit or on overflow.

    Args:
        process: started in a session of its own, with a pipe as stdin.
        stdin: bytes for its standard input, which is closed after them.
        pipes: name to (descriptor, bound in bytes).
        seconds: time limit, wall clock.
    """
    assert process.stdin is not None
    deadline = time.monotonic() + seconds
    output = {name: bytearray() for name in pipes}
    timed_out = overflowed = False
    with selectors.DefaultSelector() as selector:
        _register(selector, process.stdin, pipes)
        pending = memoryview(stdin)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if timed_out := time.monotonic() >= deadline:
                break
            for key, _ in ready:
                if key.data is None:
                    pending = _feed(selector, process.stdin, pending)
                else:
                    overflowed |= _drain(selector, key.fd, output[key.data], pipes[key.data][1])
            if overflowed:
                break
    if not (timed_out or overflowed):
        timed_out = not _ends(process, deadline)
    _kill_group(process)
    return Pumped({name: bytes(read) for name, read in output.items()}, timed_out, overflowed)


def _register(selector: selectors.BaseSelector, stdin: IO[bytes], pipes: Mapping[str, tuple[int, int]]) -> None:
    os.set_blocking(stdin.fileno(), False)
    selector.register(stdin, selectors.EVENT_WRITE, None)
    for name, (descriptor, _) in pipes.items():
        selector.register(descriptor, selectors.EVENT_READ, name)


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


def _ends(process: "subprocess.Popen[bytes]", deadline: float) -> bool:
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    # The leader may be gone while a child of it lives; the group is named after it until it is waited for and empty.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
