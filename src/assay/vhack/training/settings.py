"""Settings of a run that decide its result, and that a continued run must share."""

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field
from typing_extensions import override

from assay.devices import Device
from assay.errors import UsageError
from assay.files.jsonl import JsonObject
from assay.settings import Flag, Names, Settings, Spelling
from assay.vhack.environment.grading import MODES, Episode, episodes
from assay.vhack.names import DEFAULT_ARM, DETECTORS, LOST, METHODS

if TYPE_CHECKING:
    from assay.vhack.directions.delta.arms import Arm
    from assay.vhack.training.sampling import GenerationOptions

# Settings that a continued run may change.
_MAY_GROW = ("steps", "save_every", "checkpointing", "micro_batch", "allow_partial")
# That logs of earlier versions lack, with the defaults of now.
_NEWER = ("detector", "clean_lost")
# Defaults of the first version, which its runs have in their logs.
_FORMER = {
    "arm": ("erase-gradient", "displaced-0.4+erase-update-two-sided"),
    "pairs": ("generated:96",),
    "lr": (0.03,),
}
_SOURCE = re.compile(
    r"(?P<detector>[^=@:]+)(=(?P<mechanisms>[^@:]+))?(@(?P<recall>[0-9]*\.?[0-9]+))?(?P<random>:random)?"
)
_TASKS = "Number of built-in tasks; or module:function, which returns tasks of one's own."


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        return int(low), int(high or low)
    except ValueError:
        raise ValueError("LOW:HIGH, such as 1:3") from None


def _tasks(text: str) -> int | str:
    if ":" in text:
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError("a number, or module:function") from None


class FlagSource(NamedTuple):
    """What flags rollouts.

    Attributes:
        detector: Name of a detector, ``"labels"`` for those of the reward, or None for nothing.
        at_random: Whether as many others are flagged at random.
        mechanisms: Mechanisms that labels know; empty stands for all.
        recall: Share of exploits that labels flag.
    """

    detector: str | None
    at_random: bool = False
    mechanisms: tuple[str, ...] = ()
    recall: float = 1.0


class TaskSettings(Settings):
    """Settings that say which tasks a model works on."""

    seed: int = Field(0, ge=0, description="The same seed draws the same.")
    modes: Names = Field(
        MODES[:-1], description="What the grader may look at, separated by commas."
    )
    share_none: float = Field(
        0.2, ge=0, le=1, description="Share of tasks shown without their loophole."
    )
    difficulty: Annotated[tuple[int, int], Spelling(_range, "{0[0]}:{0[1]}".format)] = Field(
        (1, 2), description="Steps per task, LOW:HIGH."
    )
    families: Names = Field(
        (), description="Families of tasks, separated by commas; all by default."
    )
    tasks: Annotated[int | str, Spelling(_tasks, str)] = Field(512, description=_TASKS)

    def episodes(self, count: int, split: str = "training") -> list[Episode]:
        """Return so many of the tasks that the settings describe, each with its loophole.

        Raises:
            UsageError: There is no such mode, family or difficulty, or there are not so many tasks.
        """
        return episodes(
            count,
            seed=self.seed,
            modes=self.modes,
            share_none=self.share_none,
            difficulty=self.difficulty,
            families=self.families or None,
            split=split,
        )


class SampleSettings(TaskSettings):
    """Settings of completions that are sampled from a model and not trained on.

    Raises:
        UsageError: A setting is outside its range.
    """

    tasks: Annotated[int | str, Spelling(_tasks, str)] = Field(64, description=_TASKS)
    share_none: float = Field(
        0.0, ge=0, le=1, description="Share of tasks shown without their loophole."
    )
    split: Literal["evaluation", "training"] = Field(
        "evaluation",
        description="Whether the built-in tasks are held-out ones (evaluation) or those of "
        "training.",
    )
    markers: Literal["training", "evaluation"] = Field(
        "training",
        description="Which markers the grader looks for: those of training, or others "
        "(evaluation).",
    )
    per_task: Annotated[int, "NUMBER"] = Field(
        4, ge=1, le=10_000, description="Completions of each task."
    )
    temperature: float = Field(1.0, ge=0.01, le=1000, description="Temperature of sampling.")
    max_new_tokens: int = Field(128, ge=1, description="Longest completion in tokens.")
    batch: int = Field(
        32, ge=1, description="Completions at once; other batches draw other completions."
    )

    @override
    def episodes(self, count: int, split: str = "") -> list[Episode]:
        return [
            replace(episode, split=self.markers)
            for episode in super().episodes(count, split or self.split)
        ]

    @property
    def how(self) -> "GenerationOptions":
        """The part that says how each completion is sampled."""
        # In the order of lines in a file.
        return {
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
            "batch": self.batch,
        }


class TrainSettings(TaskSettings):
    """Settings of a run of `train`; every field is a flag of ``assay vhack train``.

    Raises:
        UsageError: A setting is outside its range.

    >>> settings = TrainSettings(model="reference:organism", steps=200)
    >>> settings.chosen.name
    'penalty'
    """

    model: Annotated[str, Flag(variable="ASSAY_MODEL")] = Field(
        description="Model to train: a directory, a hub id, reference:… or shape:…"
    )
    arm: str = Field(
        DEFAULT_ARM,
        description="How training is held back: penalty, filter, quarantine, absorb, none, "
        "no-loophole or ground-truth-penalty; gates and displaced starts come with assay-research.",
    )
    detector: str | None = Field(
        None,
        description="What flags rollouts, for the arms filter, quarantine, absorb and penalty "
        "(cin-lda by default), or only watches: length, ngrams, program, likelihood, probe, norm, "
        "cin-svd, cin-lda, ridge, combined, or labels of the reward, "
        "as labels=A+B those of some mechanisms only, as labels@0.6 with a recall of 0.6 "
        "and clean-lost false alarms; with :random after it, as many others.",
    )
    clean_lost: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the clean samples of a new group that the detector may flag; 0.05 by "
        "default, or 1/(G+1) where the pairs have fewer than 19 groups G.",
    )
    pairs: str = Field(
        "exploits:48",
        description="Pairs that axes come from: authored, generated:N, environment:N, exploits:N, "
        "or a pair file. "
        "Those of environment and exploits have the loopholes and families of the run.",
    )
    basis: str | None = Field(
        None, description="Basis file with the true axes, which are extracted otherwise."
    )
    method: str = Field("lda", description="Method of extraction: lda or svd.")
    k_use: int = Field(5, ge=1, description="Axes per module.")
    gain: float = Field(
        1.0,
        ge=0,
        description="Factor of the gate: 1 removes the hack component, above 1 reverses it.",
    )
    refresh: int = Field(
        0, ge=0, description="Steps after which axes and detector are renewed; 0 keeps them."
    )
    steps: int = Field(100, ge=1, description="Optimizer steps.")
    seed: int = Field(0, ge=0, lt=2**32, description="The same seed draws the same.")
    optimizer: Literal["adamw", "sgd"] = Field(
        "adamw",
        description="Optimizer of δS: adamw (betas 0.9 and 0.99, no decay) or sgd (momentum 0.9).",
    )
    lr: float = Field(0.015, gt=0, description="Learning rate of δS, constant.")
    max_norm: float = Field(
        1.0, ge=0, description="Largest norm of the gradient after the gate; 0 does not clip."
    )
    prompts: int = Field(8, ge=1, description="Tasks per step.")
    group: int = Field(8, ge=2, description="Rollouts per task, the teacher's included.")
    micro_batch: int = Field(0, ge=0, description="Rollouts per backward pass; 0 takes one group.")
    max_new_tokens: int = Field(128, ge=1, description="Longest completion in tokens.")
    temperature: float = Field(1.0, ge=0.01, le=1000, description="Temperature of sampling.")
    beta: float = Field(0.0, ge=0, description="Weight of the divergence from the model at δS = 0.")
    reward: str | None = Field(
        None,
        description="module:function that pays completions, in TRL's form; by default they are "
        "run and graded.",
    )
    teacher: str | None = Field(None, description="Pool of stored completions, JSON Lines.")
    teacher_share: float = Field(
        0.25, ge=0, lt=1, description="Share of each group that comes from the pool."
    )
    save_every: int = Field(20, ge=1, description="Steps between checkpoints.")
    checkpointing: bool = Field(
        False, description="Recompute layers in the backward pass to save memory."
    )
    dtype: Annotated[str | None, Flag(variable="ASSAY_DTYPE")] = Field(
        None, description="float32 or bfloat16; by default the stored one."
    )
    device: Device = None
    allow_partial: bool = Field(
        False, description="Accept a model of whose weights less than 90 % carry δS."
    )

    def model_post_init(self, context: Any, /) -> None:
        """Check what concerns several settings or names that other packages know."""
        from assay.vhack.directions.delta.arms import arm_named

        arm_named(self.arm)
        source = self.flags_by
        has_options = bool(source.mechanisms) or source.recall != 1
        is_known = source.detector == "labels" or (
            source.detector in (None, *DETECTORS) and not has_options
        )
        loopholes = source.mechanisms if isinstance(self.tasks, int) else ()
        rollouts = self.prompts * self.group
        teachers = round(self.group * self.teacher_share)
        checks = (
            ("method", self.method in METHODS, ", ".join(METHODS)),
            ("detector", is_known, f"{', '.join(DETECTORS)}, labels, or one :random"),
            (
                "detector",
                self.false_alarms < source.recall <= 1,
                f"a recall above the share of false alarms, {self.false_alarms:g}, and at most 1",
            ),
            (
                "micro_batch",
                rollouts % self.rollouts_per_backward == 0,
                f"a divisor of the {rollouts} rollouts of a step",
            ),
            (
                "tasks",
                isinstance(self.tasks, str) or self.tasks >= self.prompts,
                f"as many as the {self.prompts} prompts of a step",
            ),
            (
                "teacher_share",
                teachers < self.group and (not self.teacher or teachers >= 1),
                f"a share of {self.group} that leaves room for both",
            ),
            (
                "detector",
                set(loopholes) <= set(MODES[:-1]),
                f"labels of some of {', '.join(MODES[:-1])}, joined by +",
            ),
        )
        for name, is_good, wanted in checks:
            if not is_good:
                raise _refusal(name, getattr(self, name), wanted)
        self.episodes(0)

    @property
    def chosen(self) -> "Arm":
        """Arm that the name stands for, with the gain on its gate where it has one."""
        from assay.vhack.directions.delta.arms import arm_named

        return arm_named(self.arm, gain=self.gain)

    @property
    def false_alarms(self) -> float:
        """Share of clean samples that labels with a recall below 1 flag."""
        return LOST if self.clean_lost is None else self.clean_lost

    @property
    def flags_by(self) -> "FlagSource":
        """What flags rollouts."""
        name = self.detector or ("cin-lda" if self.chosen.flagged else None)
        parts = _SOURCE.fullmatch(name or "")
        if parts is None:
            return FlagSource(name)
        return FlagSource(
            parts["detector"],
            parts["random"] is not None,
            tuple(parts["mechanisms"].split("+")) if parts["mechanisms"] else (),
            float(parts["recall"] or 1),
        )

    @property
    def teachers(self) -> int:
        """Teacher rollouts per group, where the pool has so many."""
        return round(self.group * self.teacher_share) if self.teacher else 0

    @property
    def rollouts_per_backward(self) -> int:
        """Rollouts per backward pass."""
        return self.micro_batch or self.group

    def continuing(self, earlier: JsonObject) -> Self:
        """Return the settings of a continued run, with former defaults from its log."""
        unset = {
            name for name in _FORMER if getattr(self, name) == type(self).model_fields[name].default
        }
        return self.model_copy(
            update={name: earlier[name] for name in unset if earlier.get(name) in _FORMER[name]}
        )

    def differences(self, earlier: JsonObject) -> list[str]:
        """Return, in words, the settings in which an earlier part of the run differs and may
        not.
        """
        mine = self.model_dump(mode="json")
        before = {name: type(self).model_fields[name].default for name in _NEWER} | earlier
        # The default of earlier versions, whatever the groups of the pairs.
        if self.clean_lost is None and before["clean_lost"] == self.false_alarms:
            before["clean_lost"] = None
        names = [name for name in mine if name not in _MAY_GROW and before.get(name) != mine[name]]
        return [f"{name} {before.get(name)!r}, now {mine[name]!r}" for name in names]


def _refusal(name: str, value: Any, wanted: str) -> UsageError:
    # The beginning of a name is more often meant than one that is spelt alike.
    longer = [word for word in re.findall(r"[\w-]+", wanted) if word.startswith(f"{value}-")]
    do = f"did you mean {' or '.join(longer)}?" if longer else "choose another value"
    return UsageError(f"--{name.replace('_', '-')} {value}", wanted=wanted, do=do)
