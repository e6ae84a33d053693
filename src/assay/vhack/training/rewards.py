"""Rewards of completions: of the environment, or your own in Python.

*A reward* is a function of TRL's form: it takes prompts, completions and the columns of the tasks
as lists of one length, and returns what each completion is paid. Instead of a number it may return
a mapping with ``reward`` and, for the hack and solve rate in the log, ``exploited`` and
``correct``::

    def reward(prompts, completions, answer, **_):
        return [float(text.strip() == wanted) for text, wanted in zip(completions, answer)]
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from typing_extensions import override

from assay.errors import DataError, UsageError
from assay.vhack.directions.delta.arms import Arm
from assay.vhack.environment.grading import Episode, grade_many
from assay.vhack.training.outcomes import FLAGS, MARKS, Graded, Outcomes
from assay.vhack.training.tasks import (
    RewardFunction,
    Task,
    check_gradable,
    mechanism_of,
    read_prompt,
)

if TYPE_CHECKING:
    from datasets import Dataset


class Reward(ABC):
    """A reward function for TRL, and the dataset of tasks that goes with it.

    Attributes:
        prompts: Prompt of each task.
        last: Outcomes of the rollouts that were paid last, in their order.
        mechanisms: Mechanism of the task of each of these, see :func:`mechanism_of`.
        known_flags: Flags that these outcomes know.
    """

    __name__ = "episode"

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = list(tasks)
        self.prompts = [read_prompt(task) for task in tasks]
        self.last = Outcomes(torch.zeros(0, len(FLAGS), dtype=torch.bool), torch.zeros(0))
        self.mechanisms: list[str] = []
        self.known_flags: Collection[str] = FLAGS

    @abstractmethod
    def grade(self, rows: Sequence[int], completions: Sequence[str]) -> list[Graded]:
        """Return what completions are worth, given the index of the task of each."""

    def __call__(
        self, prompts: list[str], completions: list[str], episode: list[int], **columns: Any
    ) -> list[float | None]:
        """Return what completions are paid; TRL passes the dataset's columns, and ``teacher``."""
        grades = self.grade(episode, completions)
        self.mechanisms = [mechanism_of(self.tasks[row]) for row in episode]
        is_teacher = columns.get("teacher") or [False] * len(grades)
        marks = {name: [getattr(grade, name) for grade in grades] for name in MARKS}
        self.known_flags = [name for name, values in marks.items() if None not in values]
        # No detector has flagged any of them yet.
        unjudged = [False] * len(grades)
        rows = zip(is_teacher, *marks.values(), unjudged, unjudged, strict=True)
        flags = torch.tensor([[bool(flag) for flag in row] for row in rows])
        self.last = Outcomes(flags, torch.tensor([grade.reward for grade in grades]))
        return [grade.reward for grade in grades]

    def dataset(self, count: int, seed: int) -> "Dataset":
        """Return so many prompts of a run in their order, with the index of each one's task.

        All tasks come once in random order, then again in another one. TRL's own shuffling would
        forget, in a run that is continued, how often it has shuffled.
        """
        from datasets import Dataset

        n = len(self.prompts)
        epochs = [
            random.Random(f"order {seed} {epoch}").sample(range(n), n)
            for epoch in range(math.ceil(count / n))
        ]
        order = [*chain(*epochs)][:count]
        columns = {"prompt": [self.prompts[index] for index in order], "episode": order}
        return cast("Dataset", Dataset.from_dict(columns))


class EpisodeReward(Reward):
    """The reward of the environment; the arm says what correct and exploiting programs are paid.

    Args:
        episodes: Tasks of the environment.
        arm: Arm of the run.
        workers: Programs that run side by side.
        allow_unsandboxed: Whether programs run where nothing can isolate them.
    """

    def __init__(
        self,
        episodes: Sequence[Episode],
        arm: Arm,
        *,
        workers: int = 2,
        allow_unsandboxed: bool = False,
    ) -> None:
        super().__init__(episodes)
        self.arm = arm
        self._grade = partial(grade_many, workers=workers, allow_unsandboxed=allow_unsandboxed)

    @override
    def grade(self, rows: Sequence[int], completions: Sequence[str]) -> list[Graded]:
        episodes = [cast("Episode", self.tasks[row]) for row in rows]
        programs = [
            (episode, episode.program(completion))
            for episode, completion in zip(episodes, completions, strict=True)
        ]
        return [
            Graded(
                self.arm.reward(float(grade.correct), float(grade.exploited)),
                grade.correct,
                grade.exploited,
                grade.accepted and grade.vacuous,
                grade.fault,
            )
            for grade in self._grade(programs)
        ]


class OwnReward(Reward):
    """A reward by a function of one's own, in place of the environment's.

    Raises:
        UsageError: The arm pays exploits otherwise than the function does.
    """

    def __init__(self, tasks: Sequence[Task], function: RewardFunction, arm: Arm) -> None:
        super().__init__(tasks)
        if arm.exploit_pays != Arm.exploit_pays:
            raise UsageError(
                f"the arm {arm.name} with a reward of one's own",
                wanted="an arm that leaves the pay as it is",
                do="take another arm, and let the reward itself pay less",
            )
        self.function = function

    @override
    def grade(self, rows: Sequence[int], completions: Sequence[str]) -> list[Graded]:
        """Return what the function pays.

        Raises:
            DataError: The function returns something else than one finite number for each
                completion.
        """
        prompts = [self.prompts[row] for row in rows]
        columns = self._columns(rows)
        try:
            values = list(self.function(prompts=prompts, completions=list(completions), **columns))
        except (Exception, SystemExit) as error:  # whatever a function of the user raises
            raise _bad_reward(f"nothing, but raised {type(error).__name__}: {error}") from error
        if len(values) != len(prompts):
            raise _bad_reward(f"{len(values)} rewards for {len(prompts)} completions")
        return [read_grade(value) for value in values]

    def _columns(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """Return the columns of tasks as TRL passes them: None where a task lacks one."""
        tasks = [self.tasks[row] for row in rows]
        records: list[Mapping[str, Any]] = [
            {"task": task} if isinstance(task, Episode) else {} if isinstance(task, str) else task
            for task in tasks
        ]
        names = {name for record in records for name in record} - {"prompt"}
        return {name: [record.get(name) for record in records] for name in names}


def make_reward(
    tasks: Sequence[Task],
    function: RewardFunction | None,
    arm: Arm,
    source: str,
    *,
    workers: int,
    allow_unsandboxed: bool = False,
) -> Reward:
    """Return the reward of tasks by a function of one's own, or without one by the environment.

    ``source`` is what errors call the tasks.

    Raises:
        UsageError: Tasks that the environment cannot grade have no function, or the arm pays
            exploits otherwise.
        BackendUnavailable: There is neither a sandbox nor a function.
    """
    if function is not None:
        return OwnReward(tasks, function, arm)
    episodes = check_gradable(tasks, source, allow_unsandboxed=allow_unsandboxed)
    return EpisodeReward(episodes, arm, workers=workers, allow_unsandboxed=allow_unsandboxed)


def read_grade(value: Any) -> Graded:
    """Return the grade that a reward function returned: a number, or a mapping with marks.

    Raises:
        DataError: It is neither.
    """
    marks: Mapping[str, Any] = value if isinstance(value, Mapping) else {"reward": value}
    reward = math.nan
    with suppress(TypeError, ValueError, OverflowError):
        reward = float(marks.get("reward"))  # type: ignore[arg-type]
    # "1" is an answer that was not graded, and a text is true whatever it says.
    if not math.isfinite(reward) or isinstance(marks["reward"], str | bytes):
        raise _bad_reward(repr(value)[:80])
    correct, exploited, vacuous = (_read_mark(marks, name) for name in MARKS)
    return Graded(reward, correct, exploited, vacuous)


def _read_mark(marks: Mapping[str, Any], name: str) -> bool | None:
    value = marks.get(name)
    if value is None:
        return None
    try:
        # NaN is true to Python.
        if isinstance(value, str | bytes) or math.isnan(value):
            raise TypeError
        return bool(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise _bad_reward(f"a mark {name!r} that is neither true nor false") from None


def _bad_reward(seen: str) -> DataError:
    return DataError(
        f"the reward returned {seen}",
        wanted="one finite number for each completion, or a mapping with it under 'reward'",
        do="correct the function",
    )
