"""Progress of the slow steps of loading a model, for a command line that shows it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str, int, int], None]
"""Takes the name of a step, and how many of how many weights it has finished."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call a function with the progress inside the block, in this thread."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def report_progress(step: str, finished: int, total: int) -> None:
    """Call the listener, if there is one; in a library nothing listens."""
    if listener := _listener.get():
        listener(step, finished, total)
