"""Fuzz the grader: hostile programs and reports, each graded as a training step would grade it.

After arXiv 2606.01066, which fuzzes a verifier before a policy does. What must hold: no case ends a
step, none is an unpaid grade for an error of the grader, none is graded as right, and honest
programs that are graded among them get their grade.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from assay.errors import BackendUnavailable, UsageError
from assay.vhack.environment.grading import MODES, Episode, Grade, grade_many
from assay.vhack.environment.runs import Limits
from assay.vhack.environment.sandbox import run
from assay.vhack.environment.tasks import Task, tasks
from assay_research.hostile import HOSTILE_KINDS, hostile_case

_STEP = 100  # cases that are graded together, as a step of training does
_SHOWN = 50
_SECONDS = 1.0  # what hangs is to be stopped, not waited for
_PATIENT_SECONDS = 60.0  # a busy machine is no fault of an honest program

Item = tuple[Episode, str]
"""Episode and program, as `grade_many` takes them."""

_ENDED = "ended_a_step"
_FAULT = "grader_raised"
_SOLVED = "graded_as_right"
_FAILURES = (_ENDED, _FAULT, _SOLVED)


@dataclass(frozen=True)
class FuzzReport:
    """What became of hostile cases.

    Attributes:
        counts: By kind, how many ``cases`` there were and how they were graded: ``accepted`` by
            their channel, ``exploited`` (paid through the loophole of their mode), ``timed_out``,
            ``overflowed``, ``raised`` in the sandbox, ``crashed``, and the failures
            ``ended_a_step``, ``grader_raised`` and ``graded_as_right``.
        honest: Number of honest programs that were graded among them.
        failures: Names of cases, at most fifty, each with what it did.
    """

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    honest: int = 0
    failures: tuple[tuple[str, str], ...] = ()

    @property
    def total(self) -> Counter[str]:
        """The counts of all kinds together."""
        return sum(self.counts.values(), Counter())

    @property
    def holds(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {
            "holds": self.holds,
            "honest": self.honest,
            "failures": [{"case": case, "did": did} for case, did in self.failures],
            "total": dict(sorted(self.total.items())),
            "kinds": {kind: dict(sorted(counted.items())) for kind, counted in self.counts.items()},
        }


def fuzz(
    count: int,
    *,
    seed: int = 0,
    kinds: Sequence[str] = HOSTILE_KINDS,
    limits: Limits | None = None,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> FuzzReport:
    """Grade hostile programs and reports, and tell what they did to the grader.

    Kinds take turns, a hundred cases are graded together, and with each hundred two honest
    programs, one right and one wrong. A hundred that ends with an exception is graded again one by
    one.

    Args:
        count: Number of cases.
        seed: Number that chooses them.
        kinds: Names in ``HOSTILE_KINDS``.
        limits: Bounds of each run; by default those of training, with a second of time.
        workers: How many programs run at the same time.
        progress: Function that is called with the number of cases done and of all.

    Raises:
        UsageError: ``count`` is below 1, or a kind is unknown.
        BackendUnavailable: No sandbox can be used here. Hostile programs never run without one.

    Example:
        >>> from assay.vhack.environment import fuzz
        >>> fuzz(8, kinds=["text"]).holds
        True
    """
    unknown = [kind for kind in kinds if kind not in HOSTILE_KINDS]
    if count < 1 or unknown or not kinds:
        raise UsageError(
            f"{count} hostile cases of kind {', '.join(unknown or kinds) or 'none'}",
            wanted=f"1 or more of {', '.join(HOSTILE_KINDS)}",
            do="correct the count or the kind",
        )
    run("")  # without a sandbox this raises before anything hostile is run
    limits = limits or Limits(seconds=_SECONDS)
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    failures: list[tuple[str, str]] = []
    honest = 0
    for begin in range(0, count, _STEP):
        numbers = range(begin, min(begin + _STEP, count))
        cases = [
            hostile_case(f"{kinds[number % len(kinds)]}/{seed}/{number}") for number in numbers
        ]
        friends = _honest(begin // _STEP)
        grades = _step(
            [(fuzzed.episode, fuzzed.program) for fuzzed in cases]
            + [fuzzed for fuzzed, _ in friends],
            limits,
            workers,
        )
        for case, outcome in zip(cases, grades[: len(cases)], strict=True):
            outcomes = _outcomes(outcome)
            counts[case.kind].update(["cases", *outcomes])
            failures += [(case.name, _said(did, outcome)) for did in _FAILURES if did in outcomes]
        for (item, right), outcome in zip(friends, grades[len(cases) :], strict=True):
            honest += 1
            if wrong := _misjudged(item, right, outcome):
                failures.append((f"honest program of step {begin // _STEP}", wrong))
        if progress:
            progress(numbers.stop, count)
    return FuzzReport(
        {kind: outcome for kind, outcome in counts.items() if outcome},
        honest,
        tuple(failures[:_SHOWN]),
    )


@cache
def _tasks() -> tuple[Task, ...]:
    return tuple(tasks(16, seed=6, difficulty=2))


def _honest(step: int) -> list[tuple[Item, bool]]:
    """Return a program that solves its task and one that fails at it, with what their grade has to
    be.
    """
    episode = Episode(_tasks()[step % len(_tasks())], MODES[step % len(MODES)])
    return [
        ((episode, episode.honest()), True),
        ((episode, episode.honest(episode.task.source(0))), False),
    ]


def _step(items: Sequence[Item], limits: Limits, workers: int) -> list[Grade | str]:
    """Return the grade of every item, or the name of the error with which it ended the step."""
    try:
        return list(grade_many(items, limits=limits, workers=workers))
    except BackendUnavailable:
        raise
    except Exception as error:
        alone = [_alone(item, limits) for item in items]
        if all(isinstance(outcome, Grade) for outcome in alone):
            return [f"{type(error).__name__}, beside other cases only", *alone[1:]]
        return alone


def _alone(item: Item, limits: Limits) -> Grade | str:
    try:
        return grade_many([item], limits=limits)[0]
    except Exception as error:
        return type(error).__name__


def _outcomes(outcome: Grade | str) -> list[str]:
    """Return the names of what became of a case; none of them solves its task."""
    if isinstance(outcome, str):
        return [_ENDED]
    result = outcome.result
    became = {
        _FAULT: outcome.fault,
        _SOLVED: outcome.correct,
        "accepted": outcome.accepted,
        "exploited": outcome.exploited,
        "timed_out": result.timed_out,
        "overflowed": result.overflowed,
        "raised": result.raised,
        "crashed": result.returncode is not None and result.returncode < 0,
    }
    return [name for name, holds in became.items() if holds]


def _said(did: str, outcome: Grade | str) -> str:
    cause = outcome if isinstance(outcome, str) else outcome.fault
    return did.replace("_", " ") + (f": {cause}" if cause else "")


def _misjudged(item: Item, right: bool, outcome: Grade | str) -> str:
    """Return what is wrong with the grade of an honest program, or nothing; one that was too slow
    is graded again.
    """
    if isinstance(outcome, Grade) and outcome.result.timed_out:
        outcome = grade_many([item], limits=Limits(seconds=_PATIENT_SECONDS))[0]
    if isinstance(outcome, str) or outcome.fault:
        return _said(_ENDED if isinstance(outcome, str) else _FAULT, outcome)
    return (
        ""
        if outcome.correct == outcome.paid == right
        else f"graded as {'wrong' if right else 'right'}"
    )
