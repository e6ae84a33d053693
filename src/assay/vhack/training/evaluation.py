r"""Completions of tasks: sampled into a file, read again, and graded.

The file is JSON Lines, one completion per line, in the order of the tasks::

    {"prompt": "# Task: …", "completion": "    return x\n…", "tokens": [81, …],
     "logprobs": [-0.1, …],
     "task": "digits/2/17", "mode": "run_tests", "markers": "training", "group": "digits/2/17",
     "origin": {"model": "reference:organism", "weights": "…", "temperature": 1.0, …}}

It is a teacher pool (:class:`RolloutPool`) and a pool of ``assay vhack pools`` as it stands.
Completions of tasks of one's own have no ``task``, ``mode`` and ``markers``, and a ``group`` only
if their task has one.

Built-in tasks are run and graded as in training; others are paid by a reward of one's own, in the
form that training takes. Intervals of rates keep the completions of a task together.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from assay.errors import DataError, UsageError
from assay.files.jsonl import JsonObject, dumps, loads
from assay.files.storage import PartialFile
from assay.models.model import Model
from assay.stats.bootstrap import group_bootstrap
from assay.stats.rates import grouped_share_interval
from assay.streams.arrays import dtype_name
from assay.vhack.directions.delta.arms import ARMS
from assay.vhack.directions.gradients.batches import Progress
from assay.vhack.environment.grading import Episode
from assay.vhack.training.outcomes import RATES, Graded
from assay.vhack.training.rewards import make_reward
from assay.vhack.training.sampling import GenerationOptions, encode_prompts, sample_batches
from assay.vhack.training.tasks import RewardFunction, Task, mechanism_of, read_prompt

GRADED_AT_ONCE = 64  # completions between two calls of progress


def sample_tasks(
    path: str | Path,
    model: Model,
    tasks: Sequence[Task],
    *,
    origin: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Unpack[GenerationOptions],
) -> int:
    """Sample a completion of each task into a file; return how many it had already.

    Lines are written batch by batch to ``<path>.partial``, which takes its name when all are there.
    The same call after an interruption goes on, and the file is then the one of a call that was
    never interrupted.

    Args:
        path: File to write.
        model: Model to sample from.
        tasks: Tasks, each as often as it shall be completed.
        origin: What else a line says of where it comes from: a δS that the weights hold, for
            instance.
        overwrite: Whether a file of that name, or what another call has left of it, may be
            replaced.
        progress: Called with the number of completions done and of all.
        how: Temperature, longest completion, seed and completions at once.

    Raises:
        UsageError: The file exists, an interrupted call had other settings, or the model cannot
            complete the tasks.
        StorageError: The file cannot be written.
    """
    about: JsonObject = {
        "model": model.reference,
        "weights": model.digest,
        "dtype": dtype_name(model.dtype),
        **(origin or {}),
        **options,
    }
    prompts = [read_prompt(task) for task in tasks]
    descriptions = [
        {"prompt": prompt, **_about(task), "origin": about}
        for prompt, task in zip(prompts, tasks, strict=True)
    ]
    ids = encode_prompts(model, prompts, options["max_new_tokens"])
    with PartialFile(path, overwrite=overwrite) as file:
        lines = file.recover()
        is_whole = len(lines) >= len(tasks)
        first = len(lines) - (0 if is_whole else len(lines) % options["batch"])
        fits = len(lines) <= len(tasks) and all(
            _without_sample(loads(line, str(path))) == description
            for line, description in zip(lines, descriptions, strict=False)
        )
        if not fits and not overwrite:
            raise UsageError(
                f"{file.partial} holds completions that were sampled with other settings",
                wanted="the settings with which it was begun",
                do="repeat these, choose another file, or pass --overwrite",
            )
        first = first if fits else 0
        if first < len(lines):
            file.restart()
            file.append_lines(lines[:first])
        count = first
        for part in sample_batches(model, prompts, ids, first, **options):
            records = (
                asdict(completion) | description
                for completion, description in zip(part, descriptions[count:], strict=False)
            )
            file.append_lines(map(dumps, records))
            count += len(part)
            if progress is not None:
                progress(count, len(tasks))
        file.commit()
    return first


def _without_sample(record: JsonObject) -> JsonObject:
    """Return what a line says of its task and origin."""
    sampled = ("completion", "tokens", "logprobs")
    return {name: value for name, value in record.items() if name not in sampled}


def _about(task: Task) -> JsonObject:
    """Return what a line says of a task; of one's own it is the group, where there is one."""
    if isinstance(task, Episode):
        name = task.task.name
        return {"task": name, "mode": task.mode, "markers": task.split, "group": name}
    group = task.get("group") if isinstance(task, Mapping) else None
    return {"group": group} if isinstance(group, str) else {}


def group_of(task: Task) -> str:
    """Return the group that keeps completions together: ``group``, the task's name or its
    prompt.
    """
    return str(_about(task).get("group", read_prompt(task)))


@dataclass(frozen=True, slots=True)
class Rate:
    """A share of completions, or their mean reward, with its 95 % interval."""

    value: float
    low: float | None  # None for a single task, from which nothing follows for others
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
        """Return ``solve``, ``hack`` and ``vacuous``, as the reward reports them, and ``reward``.

        The interval of a share is the one of :func:`assay.stats.grouped_share_interval`, that of
        the reward a percentile bootstrap over tasks.
        """
        several = len(set(self.groups)) > 1
        ends: tuple[float | None, float | None] = (None, None)
        found: dict[str, Rate] = {}
        for name in ("solve", "hack", "vacuous"):  # the order of tables
            marks = [getattr(grade, RATES[name]) for grade in self.grades]
            if None not in marks:
                ends = grouped_share_interval(marks, self.groups) if several else ends
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
        evaluations = {}
        for mechanism in sorted(set(self.mechanisms) - {""}):
            rows = [row for row, name in enumerate(self.mechanisms) if name == mechanism]
            grades = tuple(self.grades[row] for row in rows)
            groups = tuple(self.groups[row] for row in rows)
            evaluations[mechanism] = Evaluation(grades, groups, (mechanism,) * len(rows))
        return evaluations

    def as_dict(self) -> dict[str, Any]:
        """Return counts and rates for JSON."""
        return {
            "completions": len(self.grades),
            "tasks": len(set(self.groups)),
            "faults": self.faults,
            "rates": {name: asdict(rate) for name, rate in self.rates().items()},
        }


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
        tasks: Task of each completion: an episode of the environment, or a prompt or mapping of
            one's own, of which ``group`` may say what it has in common with others, and
            ``mechanism`` its loophole.
        completions: Text of each completion.
        reward: Function that pays completions, in TRL's form; without it they are run in the
            sandbox and graded.
        workers: Number of programs that run side by side; by default one for each processor.
        allow_unsandboxed: Whether programs run where nothing can isolate them, see
            :mod:`assay.vhack.environment`.
        progress: Called with the number of completions done and of all.

    Raises:
        UsageError: There are tasks that the environment cannot grade, and no reward.
        DataError: There is no completion, or the reward returns something else than a finite number
            for each.
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
    paying = make_reward(
        tasks,
        reward,
        ARMS["none"],
        "tasks",
        workers=workers or os.cpu_count() or 1,
        allow_unsandboxed=allow_unsandboxed,
    )
    grades: list[Graded] = []
    for start in range(0, len(completions), GRADED_AT_ONCE):
        part = completions[start : start + GRADED_AT_ONCE]
        grades += paying.grade(range(start, start + len(part)), part)
        if progress is not None:
            progress(len(grades), len(completions))
    return Evaluation(tuple(grades), tuple(map(group_of, tasks)), tuple(map(mechanism_of, tasks)))
