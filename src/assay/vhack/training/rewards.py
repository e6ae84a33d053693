"""The rewards of completions: of the environment, or of one's own in Python or as
``module:function``.

*A reward* is a function of TRL's form: it takes prompts, completions and the columns of the tasks
as lists of one length, and returns what each completion is paid. Instead of a number it may return
a mapping with ``reward`` and, for the hack and solve rate in the log, ``exploited`` and
``correct``::

    def reward(prompts, completions, answer, **_):
        return [float(text.strip() == wanted) for text, wanted in zip(completions, answer)]

Shapes: B rollouts.
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from assay.errors import DataError, UsageError
from assay.vhack.directions.delta.arms import Arm
from assay.vhack.environment.grading import Episode, grade_many
from assay.vhack.training.tasks import (
    RewardFunction,
    Task,
    check_gradable,
    mechanism_of,
    read_prompt,
)

if TYPE_CHECKING:
    from datasets import Dataset


MARKS = ("correct", "exploited", "vacuous")
FLAGS = ("teacher", *MARKS, "flagged")
SOURCES = {
    "student": ("exploited", "correct", "failed"),
    "teacher": ("teacher",),
    "exploited": ("exploited",),
    "correct": ("correct",),
}
"""Kinds of rollouts that make up each source in the log, flagged or not."""
FLAGGED_KIND = ", flagged"


@dataclass(frozen=True, slots=True)
class Graded:
    """What one completion is worth."""

    reward: float  # what it is paid
    correct: bool | None = (
        None  # whether it does the work; None where the reward does not say, as in the next two
    )
    exploited: bool | None = None  # whether it is paid and not correct
    vacuous: bool | None = None  # whether the channel would accept a wrong solution too
    fault: str = ""  # name of the error for which it could not be graded, or empty


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What became of rollouts."""

    flags: Tensor  # [B, 5] bool, with the columns of ``FLAGS``
    paid: Tensor  # what each was paid before advantage modification, [B] float32

    def column(self, name: str) -> Tensor:
        """Return one column, [B] bool."""
        return self.flags[:, FLAGS.index(name)]

    def kinds(self) -> dict[str, Tensor]:
        """Return the kinds that gradients are kept apart by, [B] bool each; every rollout is of one
        kind.

        The second half is what a detector has flagged of the first.
        """
        student = ~self.column("teacher")
        exploited = self.column("exploited")
        correct = self.column("correct") & ~exploited  # a reward of one's own may say both
        found = {
            "teacher": ~student,
            "exploited": student & exploited,
            "correct": student & correct,
            "failed": student & ~exploited & ~correct,
        }
        flagged = self.column("flagged")
        seen = {name + FLAGGED_KIND: chosen & flagged for name, chosen in found.items()}
        return {name: chosen & ~flagged for name, chosen in found.items()} | seen

    def flagged(self, flags_B: Tensor) -> "Outcomes":
        """Return these outcomes with what a detector says of them."""
        return Outcomes(
            torch.cat([self.flags[:, :-1], flags_B[:, None].to(self.flags)], dim=1), self.paid
        )

    def rates(self, told: Collection[str] = FLAGS[:-1]) -> dict[str, float]:
        """Return hack and solve rate of the student's and the teacher's rollouts, of flags that the
        reward knows.

        Where ``flagged`` is among them: the share that a detector flags, of all, of hacks and of
        the others, and ``missed``, the share of hacks among what it does not flag.
        """
        found: dict[str, float] = {}
        for suffix, chosen in (("", ~self.column("teacher")), ("_teacher", self.column("teacher"))):
            count = int(chosen.sum())
            if count:
                named = (("hack", "exploited"), ("solve", "correct"), ("vacuous", "vacuous"))
                known = [(name, self.column(flag)) for name, flag in named if flag in told]
                found |= {
                    name + suffix: int((chosen & column).sum()) / count for name, column in known
                }
                found[f"rollouts{suffix}"] = count
                hack = self.column("exploited")
                flag = self.column("flagged")
                by_flag = {"flagged": (chosen, flag), "caught": (hack, flag), "lost": (~hack, flag)}
                parts = {**by_flag, "missed": (~flag, hack)} if "flagged" in told else {}
                for name, (part, counted) in parts.items():
                    among = part & chosen
                    if among.any() and (name == "flagged" or "exploited" in told):
                        found[name + suffix] = int((among & counted).sum()) / int(among.sum())
        return found


NOTHING = Outcomes(torch.zeros(0, len(FLAGS), dtype=torch.bool), torch.zeros(0))  # of no rollout


class Reward(ABC):
    """A reward function for TRL, and the dataset of tasks that goes with it.

    Attributes:
        prompts: Prompt of each task.
        last: Outcomes of the rollouts that were paid last, in their order.
        mechanisms: Mechanism of the task of each of these, as :func:`mechanism_of` says it.
        told: Flags that these outcomes know.
    """

    __name__ = "episode"

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks, self.prompts = list(tasks), [read_prompt(task) for task in tasks]
        self.last = NOTHING
        self.mechanisms: list[str] = []
        self.told: Collection[str] = FLAGS

    @abstractmethod
    def grade(self, rows: Sequence[int], completions: Sequence[str]) -> list[Graded]:
        """Return what completions are worth, given the index of the task of each."""

    def __call__(
        self, prompts: list[str], completions: list[str], episode: list[int], **others: Any
    ) -> list[float | None]:
        """Return what completions are paid; TRL passes the columns of the dataset, and
        ``teacher``.
        """
        grades = self.grade(episode, completions)
        self.mechanisms = [mechanism_of(self.tasks[row]) for row in episode]
        teacher = others.get("teacher") or [False] * len(grades)
        marks = {name: [getattr(one, name) for one in grades] for name in MARKS}
        self.told = [name for name, each in marks.items() if None not in each]
        flags = [[*map(bool, row), False] for row in zip(teacher, *marks.values(), strict=True)]
        self.last = Outcomes(torch.tensor(flags), torch.tensor([one.reward for one in grades]))
        return [one.reward for one in grades]

    def dataset(self, count: int, seed: int) -> "Dataset":
        """Return so many prompts of a run in their order, with the index of each one's task.

        All tasks come once in random order, then again in another one. TRL's own shuffling would
        forget, in a run that is continued, how often it has shuffled.
        """
        from datasets import Dataset

        n = len(self.prompts)
        rounds = (
            random.Random(f"order {seed} {index}").sample(range(n), n)
            for index in range(-(-count // n))
        )
        order = [task for turn in rounds for task in turn][:count]
        columns = {"prompt": [self.prompts[index] for index in order], "episode": order}
        made: Dataset = Dataset.from_dict(columns)
        return made


class EpisodeReward(Reward):
    """The reward of the environment, of which the arm says what is paid; so many programs run side
    by side.
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
        self.episodes = episodes
        self.arm = arm
        self._grade = partial(grade_many, workers=workers, allow_unsandboxed=allow_unsandboxed)

    @override
    def grade(self, rows: Sequence[int], completions: Sequence[str]) -> list[Graded]:
        chosen = [self.episodes[row] for row in rows]
        found = self._grade(
            [(one, one.program(text)) for one, text in zip(chosen, completions, strict=True)]
        )
        return [
            Graded(
                self.arm.reward(float(one.correct), float(one.exploited)),
                one.correct,
                one.exploited,
                one.accepted and one.vacuous,
                one.fault,
            )
            for one in found
        ]


def make_reward(
    tasks: Sequence[Task],
    function: RewardFunction | None,
    arm: Arm,
    source: str,
    *,
    workers: int,
    **how: bool,
) -> Reward:
    """Return the reward of tasks by a function of one's own, or without one by the environment.

    ``source`` is what errors call the tasks, and ``how`` may have ``allow_unsandboxed``.

    Raises:
        UsageError: Tasks that the environment cannot grade have no function, or the arm pays
            exploits otherwise.
        BackendUnavailable: There is neither a sandbox nor a function.
    """
    if function is not None:
        return OwnReward(tasks, function, arm)
    return EpisodeReward(check_gradable(tasks, source, **how), arm, workers=workers, **how)


class OwnReward(Reward):
    """A reward by a function of one's own, in a run of an arm, in the place of the environment's.

    Raises:
        UsageError: The arm pays exploits otherwise than the function does.
    """

    def __init__(self, tasks: Sequence[Task], function: RewardFunction, arm: Arm) -> None:
        super().__init__(tasks)
        if arm.exploit_pays != Arm.exploit_pays:
            wanted = "an arm that leaves the pay as it is"
            do = "take another arm, and let the reward itself pay less"
            raise UsageError(f"the arm {arm.name} with a reward of one's own", wanted=wanted, do=do)
        self.function = function

    @override
    def grade(self, rows: Sequence[int], completions: Sequence[str]) -> list[Graded]:
        """Return what the function pays.

        Raises:
            DataError: The function returns something else than one finite number for each
                completion.
        """
        chosen = [self.tasks[row] for row in rows]
        given = [
            {"task": one} if isinstance(one, Episode) else {} if isinstance(one, str) else one
            for one in chosen
        ]
        names = {name for row in given for name in row} - {"prompt"}
        columns = {
            name: [row.get(name) for row in given] for name in names
        }  # None where a task does not say it
        prompts = [self.prompts[row] for row in rows]
        try:
            returned = list(
                self.function(prompts=prompts, completions=list(completions), **columns)
            )
        except (Exception, SystemExit) as error:  # whatever a function of the user raises
            raise _refusal(f"nothing, but raised {type(error).__name__}: {error}") from error
        if len(returned) != len(prompts):
            raise _refusal(f"{len(returned)} rewards for {len(prompts)} completions")
        marks = [one if isinstance(one, Mapping) else {} for one in returned]
        return [
            Graded(
                self._pay(one),
                _flag(mark, "correct"),
                _flag(mark, "exploited"),
                _flag(mark, "vacuous"),
            )
            for one, mark in zip(returned, marks, strict=True)
        ]

    def _pay(self, one: Any) -> float:
        value: Any = one.get("reward") if isinstance(one, Mapping) else one
        with suppress(TypeError, ValueError, OverflowError):
            if math.isfinite(paid := float(value)):
                return paid
        raise _refusal(repr(one)[:80])


def _flag(mark: Mapping[str, Any], name: str) -> bool | None:
    try:
        return bool(mark[name]) if name in mark else None
    except (TypeError, ValueError, RuntimeError):
        raise _refusal(f"a mark {name!r} that is neither true nor false") from None


def _refusal(seen: str) -> DataError:
    wanted = "one finite number for each completion, or a mapping with it under 'reward'"
    do = "correct the function"
    return DataError(f"the reward returned {seen}", wanted=wanted, do=do)
