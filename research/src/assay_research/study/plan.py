"""Which runs a study makes, and on which tasks.

Runs of one seed see the same tasks in the same order, and their rollouts are drawn with the same random numbers, so
arms are compared seed by seed.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from assay.errors import UsageError
from assay.vhack.delta.arms import Arm, arm_named
from assay.vhack.environment.grading import CHANNELS, Episode
from assay.vhack.environment.tasks import Task, tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


OPTIMIZER = "adam"  # of every run, in the names of conditions


@dataclass(frozen=True)
class StudySettings:
    """What all runs of a study share.

    Attributes:
        steps: Optimizer steps.
        prompts: Number P of prompts per step and run.
        rollouts: Number G of rollouts per prompt.
        prompt_tokens: Length of the longest prompt.
        new_tokens: Length T of the longest completion.
        adam_rate, adam_betas: Learning rate and betas of Adam.
        max_norm: Largest norm of the gradient of one run.
        log_every: Steps that one line of a log is the mean of; a divisor of ``steps``, or the last ones had no line.
        pool: Number of tasks to draw from.
        evaluation: Held-out tasks per loophole.
        families: Families of tasks. Without loops by default: a wrong loop may never end, and grading waits.
        difficulty: Lowest and highest number of steps of a task.

    Raises:
        UsageError: A number is not positive, there are fewer than two rollouts per prompt, or ``log_every`` does not
            divide ``steps``.
    """

    steps: int = 300
    prompts: int = 16
    rollouts: int = 8
    prompt_tokens: int = 144
    new_tokens: int = 112
    adam_rate: float = 0.03
    adam_betas: tuple[float, float] = (0.9, 0.99)
    max_norm: float = 1.0
    log_every: int = 5
    pool: int = 4096
    evaluation: int = 8
    families: tuple[str, ...] = ("arithmetic", "branches", "digits", "counts")
    difficulty: tuple[int, int] = (1, 3)

    def __post_init__(self) -> None:
        counts = (self.steps, self.prompts, self.rollouts, self.prompt_tokens, self.new_tokens, self.log_every)
        if min(counts) < 1 or self.rollouts < 2:
            raise UsageError(f"{self}", wanted="positive numbers, and two rollouts per prompt", do="correct them")
        if self.steps % self.log_every:
            raise UsageError(
                f"a line of the log every {self.log_every} of {self.steps} steps",
                wanted="a number of steps that is a multiple of log_every, so that the last step is logged",
                do="change steps or log_every",
            )


@dataclass(frozen=True)
class StudyRun:
    """One run.

    Attributes:
        arm: Name of the arm, see :func:`assay.vhack.delta.arm_named`; ``basis`` says which axes it takes.
        seed: Seed of tasks and rollouts.
        basis: Name of the axes in the study's table of bases; the part after an ``@`` tells draws of a kind apart.
        modes: Loopholes that it is trained on.
        stored: Whether an exploit joins each prompt's own rollouts, as if the policy had just written it.

    Raises:
        UsageError: There is no such arm or loophole.
    """

    arm: str
    seed: int
    basis: str = "true"
    modes: tuple[str, ...] = tuple(CHANNELS)
    stored: bool = False

    def __post_init__(self) -> None:
        if arm_named(self.arm).flagged:
            raise UsageError(f"arm {self.arm!r} without a detector", wanted="a gate", do="use assay vhack train")
        unknown = [mode for mode in self.modes if mode not in CHANNELS]
        if unknown or not self.modes:
            raise UsageError(f"modes {self.modes}", wanted=", ".join(CHANNELS), do="choose among these")

    @property
    def how(self) -> Arm:
        """Arm that the name stands for."""
        return arm_named(self.arm)

    @property
    def condition(self) -> str:
        """Everything but the seed, in one word: what is averaged over seeds."""
        axes = f"axes-{self.basis.partition('@')[0]}" if self.basis != "true" else ""
        only = self.modes if self.modes != tuple(CHANNELS) else ()
        word = condition_of(OPTIMIZER, self.arm, axes=axes, only=only, taught=False)
        return f"{word}/{self.regime}" if self.regime else word

    @property
    def regime(self) -> str:
        """How exploits come to be sampled, in one word; empty where the policy itself is drawn from as it is."""
        return "stored-whole" if self.stored else ""

    @property
    def name(self) -> str:
        """Condition and seed, joined by a slash."""
        return f"{self.condition}/{self.seed}"


def condition_of(optimizer: str, arm: str, *, axes: str, only: Sequence[str], taught: bool) -> str:
    """Return the word for a condition.

    Args:
        optimizer: Name of the optimizer.
        arm: Name of the arm.
        axes: Name of the axes; empty for the usual ones.
        only: Loopholes that it is trained on; empty for all.
        taught: Whether stored rollouts join in.
    """
    parts = (optimizer, arm, axes, f"only-{'+'.join(only)}" if only else "", "teacher" if taught else "")
    return "/".join(part for part in parts if part)


class TaskPool:
    """The tasks of a study and their prompts as tokens.

    Args:
        settings: Settings of the study, which say how many tasks there are and how long prompts may be.
        tokenizer: Tokenizer of the model.

    Attributes:
        training: Tasks to draw from.
        last: Token that every prompt ends with.

    Raises:
        UsageError: Too few tasks have prompts that are short enough.
    """

    def __init__(self, settings: StudySettings, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.settings, self._tokenizer = settings, tokenizer
        self._ids: dict[tuple[str, str, str], list[int]] = {}
        self._exploits: dict[tuple[str, str, str], list[int]] = {}
        self._texts: dict[bytes, str] = {}
        self.training = self._short(settings.pool, "training", seed=1)
        self._evaluation = self._short(settings.evaluation * len(CHANNELS), "evaluation", seed=2)
        self.last = self.prompt(Episode(self.training[0], "run_tests"))[-1]

    def drawn(self, run: StudyRun, step: int) -> list[Episode]:
        """Return the episodes of a step; the tasks do not depend on the modes that a run is trained on."""
        rng = random.Random(f"prompts {run.seed} {step}")
        chosen = rng.sample(self.training, self.settings.prompts)
        return [Episode(task, run.modes[rng.randrange(720720) % len(run.modes)]) for task in chosen]

    def held_out(self, markers: str) -> list[Episode]:
        """Return held-out tasks, as many of every loophole, with markers of ``training`` or of ``evaluation``."""
        return [
            Episode(task, mode, markers)
            for task, mode in zip(self._evaluation, list(CHANNELS) * self.settings.evaluation, strict=True)
        ]

    def prompt(self, episode: Episode) -> list[int]:
        """Return the token ids of an episode's prompt."""
        key = (episode.task.name, episode.mode, episode.split)
        if key not in self._ids:
            self._ids[key] = list(self._tokenizer(episode.prompt)["input_ids"])
        return self._ids[key]

    def completion(self, episode: Episode, program: str) -> list[int]:
        """Return the token ids of a program's completion and the end."""
        ids: Sequence[int] = self._tokenizer(episode.completion(program))["input_ids"]
        return [*ids, self.end]

    def exploit(self, episode: Episode) -> list[int]:
        """Return the completion of the exploit, which returns its argument."""
        key = (episode.task.name, episode.mode, episode.split)
        if key not in self._exploits:
            self._exploits[key] = self.completion(episode, episode.exploit())
        return self._exploits[key]

    @property
    def end(self) -> int:
        """Token that ends a completion."""
        return int(self._tokenizer.eos_token_id)

    def texts(self, tokens_NT: Tensor) -> list[str]:
        """Return the texts of completions up to their end; equal ones, which are most, are decoded once."""
        rows_NT = tokens_NT.cpu().numpy()
        found = []
        for row_T in rows_NT:
            key = row_T.tobytes()
            text = self._texts.get(key)
            if text is None:
                ids = row_T.tolist()
                kept = ids[: ids.index(self.end)] if self.end in ids else ids
                text = self._texts[key] = str(self._tokenizer.decode(kept))
            found.append(text)
        return found

    def _short(self, n: int, split: str, seed: int) -> list[Task]:
        """Return tasks whose prompt is short enough in every mode; the marker sets differ by a few tokens."""
        drawn = tasks(
            n + n // 4 + 8, seed=seed, difficulty=self.settings.difficulty, families=self.settings.families, split=split
        )
        longest = self.settings.prompt_tokens
        found = [task for task in drawn if len(self.prompt(Episode(task, "exit_code"))) <= longest - 8][:n]
        if len(found) < n:
            raise UsageError(
                f"{len(found)} of {n} tasks with prompts of {longest} tokens", wanted=f"{n}", do="allow longer prompts"
            )
        return found
