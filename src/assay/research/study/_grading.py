"""Grading thousands of completions a step: each different one once, in processes of their own, while the GPU works.

Rollouts of many runs on the same tasks are often the same text. A grade depends on episode and program alone, so it is
kept and never asked for twice. A completion that does not compile is wrong in every mode without being run, and what a
plain program is worth is known without running it (:mod:`assay.research.study._plain`).
"""

import multiprocessing
import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import NamedTuple

from assay.research.study._plain import plain_verdict
from assay.vhack.environment import Episode, Limits, grade, task_named

__all__ = ["Grader", "Pending", "StudyVerdict"]

_CHUNK = 8  # programs per job of a process
# A program of a few lines takes milliseconds; an endless loop should not take the five seconds of the default.
_LIMITS = Limits(seconds=0.6)

Key = tuple[str, str, str, str]
"""Task name, mode, split, completion."""


class StudyVerdict(NamedTuple):
    """What of a :class:`assay.vhack.environment.Grade` is kept; ``vacuous`` only of programs that are accepted."""

    correct: bool
    accepted: bool
    vacuous: bool

    @property
    def exploited(self) -> bool:
        """Paid through the loophole, and not correct."""
        return self.vacuous and not self.correct


WRONG = StudyVerdict(correct=False, accepted=False, vacuous=False)


@dataclass(frozen=True)
class Pending:
    """Grades on their way."""

    keys: Sequence[Key]
    futures: Sequence[Future[list[tuple[Key, StudyVerdict]]]]


class Grader:
    """Processes that grade, and what they have found so far.

    Use it in a ``with`` block.

    Args:
        workers: processes; None leaves two cores for the GPU's driver.
        allow_unsandboxed: see :func:`assay.vhack.environment.run`.

    Attributes:
        asked: completions that were to be graded.
        plain: different completions whose grade was known without running them.
        graded: completions that were run.
    """

    def __init__(self, workers: int | None = None, *, allow_unsandboxed: bool = False) -> None:
        self._known: dict[Key, StudyVerdict] = {}
        self._allow = allow_unsandboxed
        self._pool = ProcessPoolExecutor(
            workers or max(1, (os.cpu_count() or 1) - 2),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_plain,
        )
        self.asked = self.plain = self.graded = 0

    def __enter__(self) -> "Grader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, items: Iterable[tuple[Episode, str]]) -> Pending:
        """Begin to grade completions of episodes; returns at once."""
        keys, todo = [], []
        for episode, completion in items:
            key = (episode.task.name, episode.mode, episode.split, completion)
            keys.append(key)
            if key in self._known:
                continue
            told = plain_verdict(episode, completion)
            # Until the grade is there it counts as wrong; `collect` of this or another call replaces it.
            self._known[key] = WRONG if told is None else StudyVerdict(*told)
            self.plain += told is not None
            if told is None and _compiles(episode.program(completion)):
                todo.append(key)
        self.asked += len(keys)
        self.graded += len(todo)
        chunks = [todo[first : first + _CHUNK] for first in range(0, len(todo), _CHUNK)]
        return Pending(keys, [self._pool.submit(_grade, chunk, self._allow) for chunk in chunks])

    def collect(self, pending: Pending) -> list[StudyVerdict]:
        """The verdicts, in the order of the items. What was submitted first must be collected first."""
        for future in pending.futures:
            self._known.update(future.result())
        return [self._known[key] for key in pending.keys]


def _plain() -> None:
    """A worker only feeds the sandbox; it needs no threads of its own."""
    os.environ["OMP_NUM_THREADS"] = "1"


def _compiles(program: str) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(program, "program.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return False
    return True


@lru_cache(maxsize=65536)
def _episode(name: str, mode: str, split: str) -> Episode:
    return Episode(task_named(name), mode, split)


def _grade(keys: Sequence[Key], allow_unsandboxed: bool) -> list[tuple[Key, StudyVerdict]]:
    found = []
    for name, mode, split, completion in keys:
        episode = _episode(name, mode, split)
        made = grade(episode, episode.program(completion), limits=_LIMITS, allow_unsandboxed=allow_unsandboxed)
        found.append(((name, mode, split, completion), StudyVerdict(made.correct, made.accepted, made.vacuous)))
    return found
