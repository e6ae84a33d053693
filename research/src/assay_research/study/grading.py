"""Grading thousands of completions a step: each different one once, in processes of their own, while the GPU works.

Rollouts of many runs on the same tasks are often the same text. A grade depends on episode and program alone, so it is
kept and never asked for twice.
"""

import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache
from typing import NamedTuple

from assay.vhack.environment.grading import Episode, grade
from assay.vhack.environment.sandbox import Limits
from assay.vhack.environment.tasks import task_named

_CHUNK = 8  # programs per job of a process
# A program of a few lines takes milliseconds; an endless loop should not take the five seconds of the default.
_LIMITS = Limits(seconds=0.6)

Key = tuple[str, str, str, str]
"""Task name, mode, split, completion."""


class StudyVerdict(NamedTuple):
    """The part of a :class:`assay.vhack.environment.Grade` that is kept; ``vacuous`` only if it is accepted.

    Attributes:
        correct: Whether every hidden case is right.
        accepted: Whether the channel was told "right".
        vacuous: Whether the channel would accept a wrong solution too.
    """

    correct: bool
    accepted: bool
    vacuous: bool

    @property
    def exploited(self) -> bool:
        """Paid through the loophole, and not correct."""
        return self.vacuous and not self.correct


WRONG = StudyVerdict(correct=False, accepted=False, vacuous=False)


class Pending(NamedTuple):
    """Grades on their way: what was submitted, in order, and the grades of those that were not known."""

    keys: Sequence[Key]
    futures: Sequence[Future[list[tuple[Key, StudyVerdict]]]]


class Grader:
    """Processes that grade, and the grades they have given so far; to be used in a ``with`` block.

    Args:
        workers: Number of processes; by default two fewer than there are cores, which are left to the GPU's driver.

    Attributes:
        asked: Number of completions that were submitted.
        graded: Number of different ones among them, which were run.
    """

    def __init__(self, workers: int | None = None) -> None:
        self._known: dict[Key, StudyVerdict] = {}
        self._pool = ProcessPoolExecutor(
            workers or max(1, (os.cpu_count() or 1) - 2),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_single_threaded,
        )
        self.asked = self.graded = 0

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, items: Iterable[tuple[Episode, str]]) -> Pending:
        """Begin to grade completions of episodes, and return at once."""
        keys, todo = [], []
        for episode, completion in items:
            key = (episode.task.name, episode.mode, episode.split, completion)
            keys.append(key)
            if key not in self._known:
                # Until the grade is there it counts as wrong; `collect` of this or another call replaces it.
                self._known[key] = WRONG
                todo.append(key)
        self.asked += len(keys)
        self.graded += len(todo)
        chunks = [todo[first : first + _CHUNK] for first in range(0, len(todo), _CHUNK)]
        return Pending(keys, [self._pool.submit(_grade, chunk) for chunk in chunks])

    def collect(self, pending: Pending) -> list[StudyVerdict]:
        """Return the verdicts in the order of the items; what was submitted first must be collected first."""
        for future in pending.futures:
            self._known.update(future.result())
        return [self._known[key] for key in pending.keys]


def _single_threaded() -> None:
    """Prepare a worker, which only feeds the sandbox and needs no threads of its own."""
    os.environ["OMP_NUM_THREADS"] = "1"


@lru_cache(maxsize=65536)
def _episode(name: str, mode: str, split: str) -> Episode:
    return Episode(task_named(name), mode, split)


def _grade(keys: Sequence[Key]) -> list[tuple[Key, StudyVerdict]]:
    found = []
    for key in keys:
        *of_episode, completion = key
        episode = _episode(*of_episode)
        made = grade(episode, episode.program(completion), limits=_LIMITS)
        found.append((key, StudyVerdict(made.correct, made.accepted, made.vacuous)))
    return found
