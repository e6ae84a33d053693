"""Rewards from the environment: completions are run in the sandbox, and paid as the arm says.

Shapes: B rollouts.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from assay.vhack.delta.arms import Arm
from assay.vhack.environment.grading import Episode, grade_many

if TYPE_CHECKING:
    from datasets import Dataset


FLAGS = ("teacher", "correct", "exploited", "vacuous")
SOURCES = {
    "student": ("exploited", "correct", "failed"),
    "teacher": ("teacher",),
    "exploited": ("exploited",),
    "correct": ("correct",),
}
"""Kinds of rollouts that make up each source in the log."""


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What became of rollouts.

    Attributes:
        flags: Flags of the rollouts, [B, 4] bool, with the columns of ``FLAGS``.
        pay: What each was paid before advantage modification, [B] float32; None where nothing was.
    """

    flags: Tensor
    pay: Tensor | None = None

    @property
    def paid(self) -> Tensor:
        """What each was paid, [B] float32."""
        return torch.zeros(len(self.flags)) if self.pay is None else self.pay

    def column(self, name: str) -> Tensor:
        """Return one column, [B] bool."""
        return self.flags[:, FLAGS.index(name)]

    def kinds(self) -> dict[str, Tensor]:
        """Return the kinds that gradients are kept apart by, [B] bool each; every rollout is of one kind."""
        student, exploited = ~self.column("teacher"), self.column("exploited")
        correct = self.column("correct") & ~exploited  # a reward of one's own may say both
        return {
            "teacher": ~student,
            "exploited": student & exploited,
            "correct": student & correct,
            "failed": student & ~exploited & ~correct,
        }

    def rates(self, told: Collection[str] = FLAGS) -> dict[str, float]:
        """Return hack and solve rate of the student's rollouts, and of the teacher's where there are any.

        Args:
            told: Flags that the reward knows; rates of others are left out.
        """
        found: dict[str, float] = {}
        for suffix, chosen in (("", ~self.column("teacher")), ("_teacher", self.column("teacher"))):
            count = int(chosen.sum())
            if count:
                named = (("hack", "exploited"), ("solve", "correct"), ("vacuous", "vacuous"))
                known = [(name, self.column(flag)) for name, flag in named if flag in told]
                found |= {name + suffix: int((chosen & column).sum()) / count for name, column in known}
                found[f"rollouts{suffix}"] = count
        return found


NOTHING = Outcomes(torch.zeros(0, len(FLAGS), dtype=torch.bool))  # of no rollout


class Reward(ABC):
    """A reward function for TRL, and the dataset that goes with it.

    Args:
        prompts: Prompt of each task.

    Attributes:
        last: Outcomes of the rollouts that were paid last, in their order.
        told: Flags that these outcomes know.
    """

    __name__ = "episode"

    def __init__(self, prompts: Sequence[str]) -> None:
        self.prompts = list(prompts)
        self.last = NOTHING
        self.told: Collection[str] = FLAGS

    @abstractmethod
    def __call__(
        self, prompts: list[str], completions: list[str], episode: list[int], **others: Any
    ) -> list[float | None]:
        """Return what completions are paid, given the index of the task of each."""

    def dataset(self, count: int, seed: int) -> "Dataset":
        """Return the prompts of a whole run in their order, with the index of each one's task.

        All tasks come once in random order, then again in another one. TRL's own shuffling would forget, in a run that
        is continued, how often it has shuffled.

        Args:
            count: Number of prompts.
            seed: Seed of the order.
        """
        from datasets import Dataset

        n = len(self.prompts)
        rounds = (random.Random(f"order {seed} {index}").sample(range(n), n) for index in range(-(-count // n)))
        order = [task for turn in rounds for task in turn][:count]
        columns = {"prompt": [self.prompts[index] for index in order], "episode": order}
        made: Dataset = Dataset.from_dict(columns)
        return made


class EpisodeReward(Reward):
    """The reward of the environment.

    Args:
        episodes: Tasks with their loopholes.
        arm: Arm that says what is paid.
        workers: Number of programs that run side by side.
        allow_unsandboxed: Whether programs run where nothing can isolate them, see :mod:`assay.vhack.environment`.
    """

    def __init__(
        self, episodes: Sequence[Episode], arm: Arm, *, workers: int = 2, allow_unsandboxed: bool = False
    ) -> None:
        super().__init__([episode.prompt for episode in episodes])
        self.episodes, self.arm = list(episodes), arm
        self._grade = partial(grade_many, workers=workers, allow_unsandboxed=allow_unsandboxed)

    def __call__(
        self, prompts: list[str], completions: list[str], episode: list[int], **others: Any
    ) -> list[float | None]:
        """Grade completions and return what each is paid; TRL passes the columns of the dataset, and ``teacher``."""
        chosen = [self.episodes[index] for index in episode]
        grades = self._grade([(one, one.program(text)) for one, text in zip(chosen, completions, strict=True)])
        teacher = others.get("teacher") or [False] * len(prompts)
        rows = [
            [bool(taught), one.correct, one.exploited, one.accepted and one.vacuous]
            for taught, one in zip(teacher, grades, strict=True)
        ]
        paid = [self.arm.reward(float(one.correct), float(one.exploited)) for one in grades]
        self.last = Outcomes(torch.tensor(rows), torch.tensor(paid))
        return [*paid]
