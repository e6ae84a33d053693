"""Which runs a study made, on which tasks, as its logs name them.

Runs of one seed see the same tasks in the same order, and their rollouts are drawn with the same
random numbers, so arms are compared seed by seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from assay.errors import UsageError
from assay.vhack.directions.delta.arms import Arm, arm_named
from assay.vhack.environment.grading import CHANNELS

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
        adam_rate, adam_betas: Learning rate and betas of Adam. max_norm: Largest norm of the
        gradient of one run. log_every: Steps that one line of a log is the mean of; a divisor of
        ``steps``, or the last ones had no line. pool: Number of tasks to draw from. evaluation:
        Held-out tasks per loophole. families: Families of tasks. Without loops by default: a wrong
        loop may never end, and grading waits. difficulty: Lowest and highest number of steps of a
        task.

    Raises:
        UsageError: A number is not positive, there are fewer than two rollouts per prompt, or
            ``log_every`` does not divide ``steps``.
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
        counts = (
            self.steps,
            self.prompts,
            self.rollouts,
            self.prompt_tokens,
            self.new_tokens,
            self.log_every,
        )
        if min(counts) < 1 or self.rollouts < 2:
            raise UsageError(
                f"{self}", wanted="positive numbers, and two rollouts per prompt", do="correct them"
            )
        if self.steps % self.log_every:
            raise UsageError(
                f"a line of the log every {self.log_every} of {self.steps} steps",
                wanted="a number of steps that is a multiple of log_every, so that the last step "
                "is logged",
                do="change steps or log_every",
            )


@dataclass(frozen=True)
class StudyRun:
    """One run.

    Attributes:
        arm: Name of the arm, see :func:`assay.vhack.directions.delta.arm_named`; ``basis`` says which axes it
            takes.
        seed: Seed of tasks and rollouts.
        basis: Name of the axes in the study's table of bases; the part after an ``@`` tells draws
            of a kind apart.
        modes: Loopholes that it is trained on.
        stored: Whether an exploit joins each prompt's own rollouts, as if the policy had just
            written it.

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
            raise UsageError(
                f"arm {self.arm!r} without a detector", wanted="a gate", do="use assay vhack train"
            )
        unknown = [mode for mode in self.modes if mode not in CHANNELS]
        if unknown or not self.modes:
            raise UsageError(
                f"modes {self.modes}", wanted=", ".join(CHANNELS), do="choose among these"
            )

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
        """How exploits come to be sampled, in one word; empty where the policy itself is drawn from
        as it is.
        """
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
    parts = (
        optimizer,
        arm,
        axes,
        f"only-{'+'.join(only)}" if only else "",
        "teacher" if taught else "",
    )
    return "/".join(part for part in parts if part)
