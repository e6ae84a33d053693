"""Rewards from the environment: completions are run in the sandbox, and paid as the arm says.

Shapes: B rollouts.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from assay.vhack.delta import Arm
from assay.vhack.environment import Episode, grade_many

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]

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
    """

    flags: Tensor

    def column(self, name: str) -> Tensor:
        """Return one column, [B] bool."""
        return self.flags[:, FLAGS.index(name)]

    def kinds(self) -> dict[str, Tensor]:
        """Return the kinds that gradients are kept apart by, [B] bool each; every rollout is of one kind."""
        student, exploited = ~self.column("teacher"), self.column("exploited")
        return {
            "teacher": ~student,
            "exploited": student & exploited,
            "correct": student & self.column("correct"),
            "failed": student & ~exploited & ~self.column("correct"),
        }

    def rates(self) -> dict[str, float]:
        """Return hack and solve rate of the student's rollouts, and of the teacher's where there are any."""
        found: dict[str, float] = {}
        for suffix, chosen in (("", ~self.column("teacher")), ("_teacher", self.column("teacher"))):
            count = int(chosen.sum())
            if count:
                named = (("hack", "exploited"), ("solve", "correct"), ("vacuous", "vacuous"))
                found |= {name + suffix: int((chosen & self.column(flag)).sum()) / count for name, flag in named}
                found[f"rollouts{suffix}"] = count
        return found


NOTHING = Outcomes(torch.zeros(0, len(FLAGS), dtype=torch.bool))  # of no rollout


class EpisodeReward:
    """A reward function for TRL, and the dataset that goes with it.

    Args:
        episodes: Tasks with their loopholes.
        arm: Arm that says what is paid.
        workers: Number of programs that run side by side.
        allow_unsandboxed: Whether programs run where nothing can isolate them, see :mod:`assay.vhack.environment`.

    Attributes:
        last: Outcomes of the rollouts that were graded last, in their order.
    """

    __name__ = "episode"

    def __init__(
        self, episodes: Sequence[Episode], arm: Arm, *, workers: int = 2, allow_unsandboxed: bool = False
    ) -> None:
        self.episodes = list(episodes)
        self.arm = arm
        self._grade = partial(grade_many, workers=workers, allow_unsandboxed=allow_unsandboxed)
        self.last = NOTHING

    def dataset(self, count: int, seed: int) -> "Dataset":
        """Return the prompts of a whole run in their order, with the index of each one's episode.

        All tasks come once in random order, then again in another one. TRL's own shuffling would forget, in a run that
        is continued, how often it has shuffled.

        Args:
            count: Number of prompts.
            seed: Seed of the order.
        """
        from datasets import Dataset

        n = len(self.episodes)
        rounds = (random.Random(f"order {seed} {index}").sample(range(n), n) for index in range(-(-count // n)))
        order = [task for turn in rounds for task in turn][:count]
        columns = {"prompt": [self.episodes[index].prompt for index in order], "episode": order}
        made: Dataset = Dataset.from_dict(columns)
        return made

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
        self.last = Outcomes(torch.tensor(rows))
        return [self.arm.reward(float(one.correct), float(one.exploited)) for one in grades]
