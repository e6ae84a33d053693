r"""Completions of tasks in a file: sampled from a model, continued after an interruption, read again to be graded.

The file is JSON Lines, one completion per line, in the order of the tasks::

    {"prompt": "# Task: …", "completion": "    return x\n…", "tokens": [81, …], "logprobs": [-0.1, …],
     "task": "digits/2/17", "mode": "run_tests", "markers": "training", "group": "digits/2/17",
     "origin": {"model": "reference:organism", "weights": "…", "temperature": 1.0, …}}

It is a teacher pool (:class:`RolloutPool`) and a pool of ``assay vhack pools`` as it stands. Completions of tasks of
one's own have no ``task``, ``mode`` and ``markers``, and a ``group`` only if their task has one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from assay.errors import DataError, UsageError
from assay.files.jsonl import JsonObject, dumps, loads, read_jsonl
from assay.files.storage import PartialFile
from assay.streams.backends import dtype_name
from assay.vhack.environment.episodes import Episode
from assay.vhack.environment.tasks import task_named
from assay.vhack.gradients.progress import Progress
from assay.vhack.training.own import Task, prompt_of
from assay.vhack.training.pool import PoolRollout, Sampling, prompt_ids, sampled

if TYPE_CHECKING:
    from assay.models.load import Model


def sample_tasks(
    path: str | Path,
    model: "Model",
    tasks: Sequence[Task],
    *,
    origin: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **how: Unpack[Sampling],
) -> int:
    """Sample one completion for each task into a file, and return how many an earlier call had left.

    Lines are written batch by batch to ``<path>.partial``, which takes its name when all are there. The same call after
    an interruption goes on, and the file is then the one of a call that was never interrupted.

    Args:
        path: File to write.
        model: Model to sample from.
        tasks: Tasks, each as often as it shall be completed.
        origin: What else a line says of where it comes from: a δS that the weights hold, for instance.
        overwrite: Whether a file of that name, or what another call has left of it, may be replaced.
        progress: Called with the number of completions done and of all.
        how: Temperature, longest completion, seed and completions at once.

    Raises:
        UsageError: The file exists, an interrupted call had other settings, or the model cannot complete the tasks.
        StorageError: The file cannot be written.
    """
    dtype = dtype_name(model.dtype)
    about = {"model": model.reference, "weights": model.digest, "dtype": dtype, **(origin or {}), **how}
    prompts = [prompt_of(task) for task in tasks]
    ids = prompt_ids(model, prompts, how["max_new_tokens"])
    with PartialFile(path, overwrite=overwrite) as file:
        lines = file.recover()
        first = len(lines) // how["batch"] * how["batch"] if len(lines) < len(tasks) else len(lines)
        fits = len(lines) <= len(tasks) and all(
            (record := loads(line, str(path))).get("origin") == about and record.get("prompt") == prompt
            for line, prompt in zip(lines, prompts, strict=False)
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
        done = first
        for part in sampled(model, prompts, ids, first, **how):
            these = tasks[done : done + len(part)]
            file.append_lines([dumps(_record(*one, about)) for one in zip(these, part, strict=True)])
            done += len(part)
            if progress is not None:
                progress(done, len(tasks))
        file.commit()
    return first


def _record(task: Task, rollout: PoolRollout, origin: Mapping[str, Any]) -> JsonObject:
    about: JsonObject = {}
    if isinstance(task, Episode):
        about = {"task": task.task.name, "mode": task.mode, "markers": task.split, "group": group_of(task)}
    elif isinstance(task, Mapping) and isinstance(task.get("group"), str):
        about = {"group": task["group"]}
    return {**asdict(rollout), **about, "origin": dict(origin)}


def group_of(task: Task) -> str:
    """Return the name of what completions of a task have in common: its ``group``, or else task or prompt itself."""
    if isinstance(task, Episode):
        return task.task.name
    named = task.get("group") if isinstance(task, Mapping) else None
    return named if isinstance(named, str) else prompt_of(task)


def read_samples(path: str | Path, tasks: Sequence[Task]) -> tuple[list[JsonObject], list[Task]]:
    """Return the lines of a file of completions, and the task of each.

    Args:
        path: File of `sample_tasks`, or of another sampler with at least a prompt and a completion in each line.
        tasks: Tasks among which those of lines without ``task`` are looked up, by their prompts.

    Raises:
        DataError: The file cannot be read or holds no line; a line has no prompt or no completion, or no task has its
            prompt, and the message names the line; or two tasks have one prompt.
    """
    by_prompt: dict[str, Task] = {}
    for task in tasks:
        if by_prompt.setdefault(prompt_of(task), task) != task:
            raise DataError(
                f"two different tasks with the prompt {prompt_of(task)!r:.80}",
                wanted="prompts by which the tasks of completions can be found",
                do="make them differ, or leave one out",
            )
    records: list[JsonObject] = []
    found: list[Task] = []
    for number, record in read_jsonl(path):
        records.append(record)
        found.append(_task_of(record, by_prompt, f"{path}, line {number}"))
    if not records:
        raise DataError(f"{path}: no completion", wanted="at least one line", do="check the path")
    return records, found


def _task_of(record: JsonObject, by_prompt: Mapping[str, Task], name: str) -> Task:
    prompt, completion = record.get("prompt"), record.get("completion")
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise DataError(f"{name}: not a completion", wanted='{"prompt": "…", "completion": "…"}', do="correct the line")
    if "task" not in record:
        if prompt not in by_prompt:
            raise DataError(
                f"{name}: a prompt of none of the {len(by_prompt)} tasks",
                wanted="prompts of the tasks, or lines of assay vhack sample with the name of a built-in one",
                do="describe the tasks by --tasks and its neighbours as they were for sampling",
            )
        return by_prompt[prompt]
    task, mode, markers = (record.get(part) for part in ("task", "mode", "markers"))
    try:
        made = Episode(task_named(str(task)), str(mode), str(markers))
    except (DataError, UsageError) as error:
        raise DataError(f"{name}: {error.seen}", wanted=error.wanted, do="correct the line") from error
    if made.prompt != prompt:
        raise DataError(
            f"{name}: a prompt that is not the one of {made.task.name} in mode {made.mode}",
            wanted="the prompt of the task that the line names",
            do="take task, mode and markers out of the line, or correct them",
        )
    return made
