"""Waiting for what comes in its own time, in another thread, process or device."""

import time
from collections.abc import Callable


def until(
    true: Callable[[], object],
    seconds: float = 20.0,
    *,
    pause: float = 0.02,
    said: Callable[[], object] = str,
) -> None:
    """Ask until something holds; it must within ``seconds``, or the test fails with what ``said``
    returns.
    """
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"it did not happen in {seconds:.0f} s: {said()}"
        time.sleep(pause)
