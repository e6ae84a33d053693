"""Tasks and files of completions, read and refused before torch is imported.

*Tasks* are a function without arguments that returns a list of prompts, or of mappings with a
``prompt``, which may be messages that the model's chat template turns into text, and whatever else
the reward needs to know of a task, or of :class:`assay.vhack.environment.Episode`::

    def tasks():
        sums = [(a, b) for a in range(10) for b in range(10)]
        return [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a, b in sums]
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, cast

from assay.errors import DataError, UsageError, reason_of
from assay.files.jsonl import JsonObject
from assay.models.chat import render_chat
from assay.vhack.environment.backends import choose_backend
from assay.vhack.environment.grading import Episode
from assay.vhack.environment.tasks import task_named
from assay.vhack.pairs.pairs import chat_columns, read_each
from assay.vhack.training.settings import TaskSettings

Task = Episode | str | Mapping[str, Any]
"""A task: a built-in one, a prompt, or a row of one's own with a prompt."""
RewardFunction = Callable[..., Sequence[float | Mapping[str, Any]]]


def import_function(where: str, flag: str) -> Callable[..., Any]:
    """Import the function ``module:function``, also from the working directory.

    Raises:
        UsageError: The text has another form, the module cannot be imported or fails when it is, or
            it has no such function. The message names the flag.
    """
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        function = resolve_name(where)
    except (Exception, SystemExit) as error:
        # A module of the user may raise anything while it is imported.
        raise UsageError(
            f"{flag} {where}: {type(error).__name__}: {error}",
            wanted="module:function, of a module that can be imported from here",
            do="check both names, start from the directory of the module, and try "
            f"python -c 'import {where.partition(':')[0]}'",
        ) from error
    finally:
        # The module may have changed the path itself.
        with suppress(ValueError):
            sys.path.remove(folder)
        # At its end, for what functions import when they are called.
        if folder not in sys.path:
            sys.path.append(folder)
    if not callable(function):
        raise UsageError(
            f"{flag} {where}, which is no function",
            wanted="module:function",
            do="name one, such as mytasks:reward",
        )
    return cast("Callable[..., Any]", function)


def load_tasks(
    settings: TaskSettings,
    tasks: Sequence[Task] | None = None,
    *,
    least: int,
    why: str,
    model: str | None = None,
) -> tuple[list[Task], str]:
    """Return the tasks of the settings, or those given, and their name in errors.

    Raises:
        UsageError: The function of the tasks cannot be found.
        DataError: It fails, a task has no prompt, or there are fewer than ``least``; ``why`` says
            what needs them. Or messages have no chat template, that of ``model``, or are refused by
            it.
    """
    source = str(settings.tasks) if tasks is None else "tasks"
    if tasks is None and isinstance(settings.tasks, int):
        tasks = settings.episodes(settings.tasks)
    elif tasks is None:
        make = import_function(str(settings.tasks), "--tasks")
        try:
            returned = make()
            if isinstance(returned, str | bytes | Mapping):
                raise TypeError(f"it returned {returned!r:.80}")
            tasks = list(returned)
        except (Exception, SystemExit) as error:  # whatever a function of the user raises
            raise DataError(
                f"--tasks {source} raised {type(error).__name__}: {error}",
                wanted="a function without arguments that returns a list of tasks",
                do="correct it",
            ) from error
    rendered = _render_tasks(list(tasks), model, source)
    if len(rendered) < least:
        raise DataError(
            f"{source}: {len(rendered)} tasks", wanted=f"at least {least}, {why}", do="add some"
        )
    for index, task in enumerate(rendered):
        if not read_prompt(task):
            raise DataError(
                f"{source}: task {index} is {task!r:.80}",
                wanted="a prompt, or a mapping with one under 'prompt'",
                do="correct what the function returns",
            )
    return rendered, source


def _render_tasks(tasks: list[Task], model: str | None, source: str) -> list[Task]:
    """Render prompts of messages by the chat template, without a beginning token that is added."""
    tokenizer: Any = None
    for index, task in enumerate(tasks):
        if not isinstance(task, Mapping) or not isinstance(task.get("prompt"), list):
            continue
        from assay.models.load import load_tokenizer

        try:
            tokenizer = tokenizer or (None if model is None else load_tokenizer(model))
            text = render_chat(chat_columns(dict(task), ())["prompt"], tokenizer)
        except (UsageError, ValueError) as error:
            raise DataError(
                f"{source}: task {index}: {reason_of(error)}",
                wanted="messages for a model with a chat template",
                do="correct them, or name the model (--model)",
            ) from None
        begins = list(tokenizer("")["input_ids"])[:1] == [tokenizer.bos_token_id]
        tasks[index] = {**task, "prompt": text.removeprefix(tokenizer.bos_token if begins else "")}
    return tasks


def check_gradable(tasks: Sequence[Task], source: str, *, allow_unsandboxed: bool) -> list[Episode]:
    """Return tasks that the environment can grade here.

    Raises:
        UsageError: There are others than built-in ones among them.
        BackendUnavailable: There is no sandbox.
    """
    graded = [task for task in tasks if isinstance(task, Episode)]
    if len(graded) < len(tasks):
        raise UsageError(
            f"{source} without a reward",
            wanted="a function that pays",
            do="say --reward module:function",
        )
    choose_backend(allow_unsandboxed=allow_unsandboxed)
    return graded


def read_prompt(task: Task) -> str:
    """Return the prompt of a task, or an empty text where it has none."""
    if isinstance(task, Episode):
        return task.prompt
    prompt = task.get("prompt") if isinstance(task, Mapping) else task
    return prompt if isinstance(prompt, str) else ""


def mechanism_of(task: Task) -> str:
    """Return the loophole of a task: its mode or ``mechanism``, or an empty text."""
    if isinstance(task, Episode):
        return task.mode
    mechanism = task.get("mechanism") if isinstance(task, Mapping) else None
    return mechanism if isinstance(mechanism, str) else ""


def read_samples(path: str | Path, tasks: Sequence[Task]) -> tuple[list[JsonObject], list[Task]]:
    """Return the lines of a file of completions, and the task of each, by name or by prompt.

    Raises:
        DataError: The file cannot be read or holds no line; a line has no prompt or no completion,
            or no task has its prompt, and the message names the line; or two tasks have one prompt.
    """
    by_prompt: dict[str, Task] = {}
    for task in tasks:
        if by_prompt.setdefault(read_prompt(task), task) != task:
            raise DataError(
                f"two different tasks with the prompt {read_prompt(task)!r:.80}",
                wanted="prompts by which the tasks of completions can be found",
                do="make them differ, or leave one out",
            )
    sampled_tasks = read_each(
        path,
        lambda record, name: (record, _task_of(record, by_prompt, name)),
        what="completion",
    )
    return [record for record, _ in sampled_tasks], [task for _, task in sampled_tasks]


def _task_of(record: JsonObject, by_prompt: Mapping[str, Task], name: str) -> Task:
    prompt = record.get("prompt")
    completion = record.get("completion")
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise DataError(
            f"{name}: not a completion",
            wanted='{"prompt": "…", "completion": "…"}',
            do="correct the line",
        )
    if "task" not in record:
        if prompt not in by_prompt:
            raise DataError(
                f"{name}: a prompt of none of the {len(by_prompt)} tasks",
                wanted="prompts of the tasks, or lines of assay vhack sample with the name of a "
                "built-in one",
                do="describe the tasks by --tasks and its neighbours as they were for sampling",
            )
        return by_prompt[prompt]
    task, mode, markers = (record.get(part) for part in ("task", "mode", "markers"))
    try:
        episode = Episode(task_named(str(task)), str(mode), str(markers))
    except (DataError, UsageError) as error:
        raise DataError(
            f"{name}: {error.seen}", wanted=error.wanted, do="correct the line"
        ) from error
    if episode.prompt != prompt:
        raise DataError(
            f"{name}: a prompt that is not the one of {episode.task.name} in mode {episode.mode}",
            wanted="the prompt of the task that the line names",
            do="take task, mode and markers out of the line, or correct them",
        )
    return episode
