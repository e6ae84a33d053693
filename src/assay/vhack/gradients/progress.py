"""How long work says where it is."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""A function that is called with the number of steps done and of all."""


def stage_progress(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Return the progress of one stage among all.

    Args:
        progress: Progress of the whole, or None.
        before: Number of steps before the stage.
        total: Number of steps of the whole.
    """
    return None if progress is None else lambda done, _: progress(before + done, total)
