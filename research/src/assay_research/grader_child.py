"""The process that grades: it imports a grader once, and forks for every completion.

``python -m assay_research.grader_child SECONDS module:function`` reads jobs as lines of JSON, each
with a problem and a completion, and writes a line for each: the ``reward``, the name of what was
``raised``, or whether it ``hung``. Without a function a job is a command and the file of its
output. Nothing that a job has started outlives it.
"""

import ctypes
import inspect
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from assay.errors import UsageError
from assay.vhack.training.tasks import import_function

_ADOPT_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER
_ROUNDS = 100  # of killing: who is killed leaves children to adopt

Grade = Callable[[Any, Any], Any]


def main() -> None:
    """Serve until there are no more jobs."""
    seconds = float(sys.argv[1])
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a grader may print
    try:
        grader = as_grader(import_function(sys.argv[2], "--reward")) if sys.argv[2:] else command
    except UsageError as error:
        answers.write(json.dumps({"error": error.seen}).encode() + b"\n")
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_ADOPT_ORPHANS, 1, 0, 0, 0)
    answers.write(b'{"imported": true}\n')
    for line in sys.stdin.buffer:
        reply = _grade_apart(grader, json.loads(line), seconds)
        answers.write(json.dumps(reply).encode() + b"\n")


def command(words: Sequence[str], output: str) -> float:
    """Run a command; return its last word where it is a number, or whether it passes."""
    with Path(output).open("wb") as file:
        code = subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.DEVNULL, check=False
        ).returncode
    if code < 0:
        # It did not answer, so nor does this process.
        os._exit(1)
    with suppress(ValueError, IndexError):
        return float(Path(output).read_text("utf-8", errors="replace").split()[-1])
    return float(code == 0)


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


def _grade_apart(grader: Grade, job: Sequence[Any], seconds: float) -> dict[str, Any]:
    """Grade in a forked process, which is ended after so many seconds."""
    earlier = psutil.Process().children()
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
    _end_others(earlier)
    with suppress(ValueError):
        return dict(json.loads(content))
    return {"hung": not is_ready}


def _end_others(earlier: Sequence[psutil.Process]) -> None:
    """End the children of this process, orphans among them, except earlier ones."""
    for _ in range(_ROUNDS):
        later = [child for child in psutil.Process().children() if child not in earlier]
        if not later:
            break
        for child in later:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        for child in later:
            with suppress(ChildProcessError):
                os.waitpid(child.pid, 0)


def _graded(grader: Grade, job: Sequence[Any]) -> dict[str, Any]:
    try:
        reward = grader(*job)
        return {"reward": reward if isinstance(reward, Mapping) else float(reward)}
    except Exception as error:
        return {"raised": type(error).__name__}


if __name__ == "__main__":
    main()
