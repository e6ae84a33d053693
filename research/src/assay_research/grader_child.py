"""The process that imports a grader once, and forks for every completion.

``python -m assay_research.grader_child module:function SECONDS`` reads jobs as lines of JSON, and
writes a line for each: the ``reward``, the name of what was ``raised``, or whether it ``hung``.
"""

import inspect
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from assay.errors import UsageError
from assay.vhack.training.tasks import import_function


def main() -> None:
    """Serve until there are no more jobs."""
    where, seconds = sys.argv[1], float(sys.argv[2])
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a grader may print
    try:
        grader = as_grader(import_function(where, "--reward"))
    except UsageError as error:
        answers.write(json.dumps({"error": error.seen}).encode() + b"\n")
        return
    answers.write(b'{"imported": true}\n')
    for line in sys.stdin.buffer:
        reply = _grade_apart(grader, json.loads(line), seconds)
        answers.write(json.dumps(reply).encode() + b"\n")


def as_grader(function: Callable[..., Any]) -> Callable[[Mapping[str, Any], str], Any]:
    """Return a reward of TRL's form, or a function of a problem and a completion, as the latter."""
    names = list(inspect.signature(function).parameters)
    if "completions" not in names:
        takes_text = names[:1] == ["prompt"]
        return lambda problem, completion: function(
            problem["prompt"] if takes_text else problem, completion
        )

    def grade(problem: Mapping[str, Any], completion: str) -> Any:
        columns = {
            name: [value] for name, value in problem.items() if name not in ("prompt", "solution")
        }
        return next(
            iter(function(prompts=[problem["prompt"]], completions=[completion], **columns))
        )

    return grade


def _grade_apart(
    grader: Callable[[Mapping[str, Any], str], Any], job: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """Grade in a forked process, which is ended after so many seconds."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(reader)
        try:
            os.write(writer, json.dumps(_graded(grader, job), default=float).encode())
        finally:
            os._exit(0)
    os.close(writer)
    is_ready = bool(select.select([reader], [], [], seconds)[0])
    content = os.read(reader, 1 << 16) if is_ready else b""
    os.close(reader)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with suppress(ValueError):
        return dict(json.loads(content))
    return {"hung": not is_ready}


def _graded(
    grader: Callable[[Mapping[str, Any], str], Any], job: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        reward = grader(job["problem"], job["completion"])
        return {"reward": reward if isinstance(reward, Mapping) else float(reward)}
    except Exception as error:
        return {"raised": type(error).__name__}


if __name__ == "__main__":
    main()
