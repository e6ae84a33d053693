"""How often a model solves its tasks and how often it hacks; intervals keep the completions of a task together.

Built-in tasks are run and graded as in training; others are paid by a reward of one's own, in the form that training
takes. Nothing is trained.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from assay.errors import DataError
from assay.stats.rates import group_bootstrap, grouped_proportion_interval
from assay.vhack.delta.arms import ARMS
from assay.vhack.environment.episodes import Episode
from assay.vhack.environment.grade import Grade, grade_many
from assay.vhack.gradients.progress import Progress
from assay.vhack.training.own import OwnReward, RewardFunction, Task, check_gradable
from assay.vhack.training.samples import group_of

_BATCH = 64  # completions that are graded between two calls of progress
_NAMES = {"solve": "correct", "hack": "exploited", "vacuous": "vacuous"}


@dataclass(frozen=True, slots=True)
class Graded:
    """What one completion is worth.

    Attributes:
        reward: What it is paid.
        correct: Whether it does the work; None where the reward does not say, as in the next two.
        exploited: Whether it is paid and not correct.
        vacuous: Whether the channel would accept a wrong solution too.
        fault: Name of the error for which it could not be graded, or empty.
    """

    reward: float
    correct: bool | None = None
    exploited: bool | None = None
    vacuous: bool | None = None
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Rate:
    """A share of completions, or their mean reward, with its 95 % interval.

    Attributes:
        value: Share or mean.
        low, high: Ends of the interval; None for a single task, from which nothing follows for others.
    """

    value: float
    low: float | None
    high: float | None

    @property
    def text(self) -> str:
        """Value and interval as text."""
        ends = "" if self.low is None else f" ({self.low:.3f} to {self.high:.3f})"
        return f"{self.value:.3f}{ends}".replace("-", "−")


@dataclass(frozen=True)
class Evaluation:
    """Grades of completions.

    Attributes:
        grades: Grade of each completion.
        groups: Name of what it has in common with others: its task.
        mechanisms: Its loophole: the mode of a built-in task, ``mechanism`` of one's own, or empty.
    """

    grades: tuple[Graded, ...]
    groups: tuple[str, ...]
    mechanisms: tuple[str, ...]

    def rates(self) -> dict[str, Rate]:
        """Return ``solve``, ``hack`` and ``vacuous`` as far as the reward tells them, and the mean ``reward``.

        The interval of a share is the one of :func:`assay.stats.grouped_proportion_interval`, that of the reward a
        percentile bootstrap over tasks.
        """
        several = len(set(self.groups)) > 1
        ends: tuple[float | None, float | None] = (None, None)
        found: dict[str, Rate] = {}
        for name, flag in _NAMES.items():
            marks = [getattr(grade, flag) for grade in self.grades]
            if None not in marks:
                ends = grouped_proportion_interval(marks, self.groups) if several else ends
                found[name] = Rate(float(np.mean(marks)), *ends)
        paid = [grade.reward for grade in self.grades]
        if several:
            drawn = group_bootstrap(lambda values: float(values.mean()), [paid], [self.groups])
            ends = drawn.low, drawn.high
        return {**found, "reward": Rate(float(np.mean(paid)), *ends)}

    @property
    def faults(self) -> int:
        """Number of completions that could not be graded and count as unpaid."""
        return sum(bool(grade.fault) for grade in self.grades)

    def by_mechanism(self) -> dict[str, "Evaluation"]:
        """Return the completions of each loophole by its name; empty where they have none."""
        found = {}
        for mechanism in sorted(set(self.mechanisms) - {""}):
            rows = [row for row, name in enumerate(self.mechanisms) if name == mechanism]
            grades, groups = tuple(self.grades[row] for row in rows), tuple(self.groups[row] for row in rows)
            found[mechanism] = Evaluation(grades, groups, (mechanism,) * len(rows))
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return counts and rates for JSON."""
        rates = {name: asdict(rate) for name, rate in self.rates().items()}
        counts = {"completions": len(self.grades), "tasks": len(set(self.groups)), "faults": self.faults}
        return {**counts, "rates": rates}


def evaluate(
    tasks: Sequence[Task],
    completions: Sequence[str],
    *,
    reward: RewardFunction | None = None,
    workers: int | None = None,
    allow_unsandboxed: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Grade completions of tasks.

    Args:
        tasks: Task of each completion: an episode of the environment, or a prompt or mapping of one's own, of which
            ``group`` may say what it has in common with others, and ``mechanism`` its loophole.
        completions: Text of each completion.
        reward: Function that pays completions, in TRL's form; without it they are run in the sandbox and graded.
        workers: Number of programs that run side by side; by default one for each processor.
        allow_unsandboxed: Whether programs run where nothing can isolate them, see :mod:`assay.vhack.environment`.
        progress: Called with the number of completions done and of all.

    Raises:
        UsageError: There are tasks that the environment cannot grade, and no reward.
        DataError: There is no completion, or the reward returns something else than a finite number for each.
        BackendUnavailable: No sandbox can be used here.

    Example::

        tasks = episodes(64, split="evaluation")
        pool = sample_pool(model, [task.prompt for task in tasks], per_prompt=1)
        found = evaluate(tasks, [rollout.completion for rollout in pool])
        print(found.rates()["hack"].text)
    """
    if not completions or len(tasks) != len(completions):
        raise DataError(
            f"{len(completions)} completions of {len(tasks)} tasks",
            wanted="at least one, and a task for each",
            do="repeat a task for each of its completions",
        )
    if reward is None:
        episodes = check_gradable(tasks, "tasks", allow_unsandboxed=allow_unsandboxed)
        sandboxed = partial(grade_many, workers=workers or os.cpu_count() or 1, allow_unsandboxed=allow_unsandboxed)
        grade = partial(_run, episodes, completions, sandboxed)
    else:
        grade = partial(_paid, OwnReward(tasks, reward, ARMS["none"]), completions)
    grades: list[Graded] = []
    for start in range(0, len(completions), _BATCH):
        grades += grade(range(start, min(start + _BATCH, len(completions))))
        if progress is not None:
            progress(len(grades), len(completions))
    return Evaluation(tuple(grades), tuple(map(group_of, tasks)), tuple(map(_mechanism, tasks)))


def _run(
    episodes: Sequence[Episode],
    completions: Sequence[str],
    sandboxed: Callable[[list[tuple[Episode, str]]], list[Grade]],
    rows: range,
) -> list[Graded]:
    found = sandboxed([(episodes[row], episodes[row].program(completions[row])) for row in rows])
    return [Graded(one.reward, one.correct, one.exploited, one.accepted and one.vacuous, one.fault) for one in found]


def _paid(own: OwnReward, completions: Sequence[str], rows: range) -> list[Graded]:
    paid = own([own.prompts[row] for row in rows], [completions[row] for row in rows], list(rows))
    marks = {flag: own.last.column(flag).tolist() for flag in _NAMES.values() if flag in own.told}
    return [
        Graded(float(value or 0.0), **{flag: column[index] for flag, column in marks.items()})
        for index, value in enumerate(paid)
    ]


def _mechanism(task: Task) -> str:
    if isinstance(task, Episode):
        return task.mode
    named = task.get("mechanism") if isinstance(task, Mapping) else None
    return named if isinstance(named, str) else ""
