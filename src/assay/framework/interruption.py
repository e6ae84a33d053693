"""Signals that end a command, and whether what it did is kept."""

from collections.abc import Iterator
from contextlib import contextmanager

from assay.errors import AssayError


class Stopped(BaseException):
    """SIGINT or SIGTERM, raised as an exception so that files and pools can clean up.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.resumable = False


@contextmanager
def resumable() -> Iterator[None]:
    """Say of a signal or a full disk inside that what was done is kept."""
    try:
        yield
    except (Stopped, OSError, AssayError) as stop:
        vars(stop)["resumable"] = True
        raise
