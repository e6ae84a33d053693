"""What one run is: everything that decides its result, and therefore what a continued run must have in common."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from assay.errors import UsageError
from assay.reports import JsonObject
from assay.vhack.delta import Arm, arm_named
from assay.vhack.environment import FAMILIES, MODES

__all__ = ["OPTIMISERS", "TrainSettings"]

OPTIMISERS = ("adamw", "sgd")
_MAY_GROW = ("steps", "save_every", "checkpointing", "micro_batch")
"""What may be another in a run that is continued."""


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a run.

    Attributes:
        model: reference of the model, as `assay.models.load_model` takes it.
        arm: name of the arm, see :data:`assay.vhack.delta.ARMS`.
        pairs: where they are, as `assay.vhack.pairs.find_pairs` takes it; those of ``environment:N`` and ``exploits:N``
            have the modes and families of the run.
        basis: a basis file for the true axes; without it they are extracted.
        method: how axes are extracted.
        k_use: axes per module.
        gain: on the counter-force of the arm's gate.
        refresh: extract the axes anew every so many steps; 0 never.
        steps: optimiser steps.
        seed: of tasks, sampling and control axes.
        optimizer: ``adamw`` (betas 0.9, 0.99, no decay) or ``sgd`` (momentum 0.9).
        lr: learning rate, constant.
        max_norm: largest norm of the gradient, after the gate; 0 does not clip.
        prompts: tasks per step.
        group: rollouts per task, the teacher's included.
        micro_batch: rollouts per backward pass; 0 is one group.
        max_new_tokens: per completion.
        temperature: of sampling.
        beta: weight of the divergence from the model at δS = 0.
        modes: what the grader may look at, of :data:`assay.vhack.environment.MODES`.
        share_none: probability with which a task is shown without its loophole.
        difficulty: lowest and highest.
        families: of tasks; empty is all.
        tasks: how many there are.
        teacher: a pool file.
        teacher_share: of each group.
        save_every: steps between checkpoints.
        checkpointing: recompute layers in the backward pass.
        dtype: of the model; None as stored.
        device: None chooses.

    Raises:
        UsageError: one of them is outside what it may be.
    """

    model: str
    arm: str = "erase-gradient"
    pairs: str = "generated:96"
    basis: str | None = None
    method: str = "lda"
    k_use: int = 5
    gain: float = 1.0
    refresh: int = 0
    steps: int = 100
    seed: int = 0
    optimizer: str = "adamw"
    lr: float = 0.03
    max_norm: float = 1.0
    prompts: int = 8
    group: int = 8
    micro_batch: int = 0
    max_new_tokens: int = 128
    temperature: float = 1.0
    beta: float = 0.0
    modes: tuple[str, ...] = MODES[:-1]
    share_none: float = 0.2
    difficulty: tuple[int, int] = (1, 2)
    families: tuple[str, ...] = ()
    tasks: int = 512
    teacher: str | None = None
    teacher_share: float = 0.25
    save_every: int = 20
    checkpointing: bool = False
    dtype: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        arm_named(self.arm)
        self._check_counts()
        self._check_ranges()
        _known("mode", self.modes, MODES)
        _known("family", self.families, tuple(FAMILIES))

    @property
    def chosen(self) -> Arm:
        """The arm, with the gain on its gate."""
        from dataclasses import replace

        arm = arm_named(self.arm)
        return arm if self.gain == 1 else replace(arm, gate=replace(arm.gate, gain=self.gain))

    @property
    def teachers(self) -> int:
        """Teacher rollouts per group, where the pool has so many."""
        return round(self.group * self.teacher_share) if self.teacher else 0

    @property
    def rollouts_per_backward(self) -> int:
        """The micro-batch."""
        return self.micro_batch or self.group

    def as_dict(self) -> JsonObject:
        """For the log."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def differences(self, earlier: JsonObject) -> list[str]:
        """The settings, in words, in which an earlier part of the run differs and may not."""
        mine = self.as_dict()
        names = [name for name in mine if name not in _MAY_GROW and earlier.get(name) != mine[name]]
        return [f"{name} {earlier.get(name)!r}, now {mine[name]!r}" for name in names]

    def _check_counts(self) -> None:
        for name in ("k_use", "steps", "prompts", "max_new_tokens", "tasks", "save_every"):
            _expect(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("refresh", "seed", "micro_batch"):
            _expect(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        _expect("group", self.group, self.group >= 2, "at least 2: the advantage is against the group's mean")
        rollouts = self.prompts * self.group
        whole = rollouts % self.rollouts_per_backward == 0
        _expect("micro_batch", self.micro_batch, whole, f"a divisor of the {rollouts} rollouts of a step")
        _expect("tasks", self.tasks, self.tasks >= self.prompts, f"as many as the {self.prompts} prompts of a step")

    def _check_ranges(self) -> None:
        for name in ("lr", "temperature"):
            _expect(name, getattr(self, name), 0 < getattr(self, name) < float("inf"), "a positive number")
        for name in ("max_norm", "beta", "gain"):
            _expect(name, getattr(self, name), 0 <= getattr(self, name) < float("inf"), "0 or more")
        _expect("share_none", self.share_none, 0 <= self.share_none <= 1, "a share from 0 to 1")
        teachers = round(self.group * self.teacher_share)
        fits = 0 <= self.teacher_share < 1 and teachers < self.group and (not self.teacher or teachers >= 1)
        _expect("teacher_share", self.teacher_share, fits, f"a share of {self.group} that leaves room for both")
        _known("optimizer", (self.optimizer,), OPTIMISERS)


def _expect(name: str, value: Any, good: bool, wanted: str) -> None:
    if not good:
        raise UsageError(f"{name.replace('_', '-')} {value}", wanted=wanted, do="choose another")


def _known(kind: str, names: Sequence[str], among: Sequence[str]) -> None:
    unknown = [name for name in names if name not in among]
    if unknown or (kind == "mode" and not names):
        raise UsageError(f"{kind} {', '.join(unknown) or 'none'}", wanted=", ".join(among), do="choose among these")
