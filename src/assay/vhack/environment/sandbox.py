"""Run a program that no one has read, and learn from outside what it does.

What is covered, and what is not, is in the table of docs/vhack-training.md. The verdict rests on one rule: the parent
compares *values*, and what it compares them with never enters the sandbox. A program that returns the right values for
hidden arguments has solved the task, by whatever means; one that prints, exits or writes on the report descriptor can
only say things about itself, for it shares a process with the harness. Reports are bounded before they are read,
programs before they are run, and no text of a program is parsed outside.

Without a sandbox (``allow_unsandboxed``) there are only resource limits, an empty environment and the filter of system
calls. The program then can make no process, thread, socket or signal, but it reads and writes this machine's files with
the rights of the user, among them the memory of that user's processes by way of /proc.
"""

import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from assay.errors import BackendUnavailable, DataError
from assay.files.jsonl import loads
from assay.vhack.environment.backends import BACKENDS, available_backend, unusable
from assay.vhack.environment.server import Ended, job_text, perform_once, server
from assay.vhack.environment.types import Call, Limits, Outcome, Result

_KINDS = ("value", "error", "opaque")
_NAME = 100  # characters of the name of an exception or a type


def run(
    program: str,
    *,
    stdin: str = "",
    calls: Sequence[Call] = (),
    files: Sequence[str] = (),
    stub: tuple[str, Any] | None = None,
    limits: Limits | None = None,
    allow_unsandboxed: bool = False,
) -> Result:
    """Run a Python program in the sandbox, then ask it questions.

    The program runs as ``__main__`` in an empty writable directory. If it ends, normally or by ``sys.exit``, the calls
    are made in order in the same process; whether it raised, printed, exited or hung is in the result, never an
    exception here. A program that is longer than its limit or has no UTF-8 form is not run.

    Args:
        program: Source text.
        stdin: Text that the program can read.
        calls: Questions to it, see `Call`.
        files: Names in its working directory whose content is wanted.
        stub: Name and value: before the program runs, every function of that name is given the body ``return value``.
        limits: Bounds of the run, by default `Limits`.
        allow_unsandboxed: Whether to run without a sandbox where no backend works. The program can then read and write
            this machine's files.

    Raises:
        BackendUnavailable: No sandbox can be used here, and ``allow_unsandboxed`` is not set.
        UsageError: Arguments are not JSON.
    """
    limits = limits or Limits()
    backend = available_backend() or _unsandboxed(allow_unsandboxed)
    refused = _refused(program, limits)
    if refused:
        nothing = (Outcome("none"),) * len(calls)
        return Result(1, stderr=f"{refused}\n", raised=refused, outcomes=nothing, backend=backend)
    nonce = secrets.token_hex(16)
    job = job_text(program, limits, nonce=nonce, stdin=stdin, calls=calls, files=files, stub=stub)
    started = time.monotonic()
    ended = _perform(backend, job, limits)
    report = _parse(ended.output["report"], nonce, len(calls))
    return Result(
        returncode=ended.returncode,
        stdout=ended.output["stdout"].decode(errors="replace"),
        stderr=ended.output["stderr"].decode(errors="replace"),
        timed_out=ended.timed_out,
        overflowed=ended.overflowed,
        seconds=time.monotonic() - started,
        backend=backend,
        **report,
    )


def _refused(program: str, limits: Limits) -> str:
    """Return the name of the error for which a program is not run at all, or an empty text."""
    try:
        return "ProgramTooLong" if len(program.encode()) > limits.program_bytes else ""
    except UnicodeEncodeError as error:
        return type(error).__name__


def _unsandboxed(allowed: bool) -> str:
    if not allowed:
        raise BackendUnavailable(
            unusable(),
            wanted="a sandbox for programs that no one has read",
            do="install bubblewrap or allow user namespaces, and keep assay in site-packages; "
            "allow_unsandboxed (--allow-unsandboxed) accepts the risk",
        )
    return "unsandboxed"


def _perform(backend: str, job: bytes, limits: Limits) -> Ended:
    """Run a job by the fork server where there is one; if that dies, run it once more without it."""
    found = server(backend) if backend in BACKENDS else None
    if found is not None:
        with suppress(OSError):
            return found.perform(job, limits)
    return perform_once(backend, job, limits)


def _parse(line: bytes, nonce: str, n_calls: int) -> dict[str, Any]:
    """Return what a report says; a program can write any bytes there, and malformed ones say nothing."""
    said: dict[str, Any] = {}
    with suppress(DataError, RecursionError, MemoryError):
        said = loads(line, "report of the sandbox")
    if said.get("nonce") != nonce:
        said = {}
    answers, raised, files = said.get("outcomes"), said.get("raised"), said.get("files")
    outcomes = [_outcome(answer) for answer in answers[:n_calls]] if isinstance(answers, list) else []
    outcomes += [Outcome("none")] * (n_calls - len(outcomes))
    texts = files.items() if isinstance(files, dict) else ()
    return {
        "finished": said.get("finished") is True,
        "raised": raised[:_NAME] if isinstance(raised, str) else "",
        "outcomes": tuple(outcomes),
        "files": {name: text for name, text in texts if isinstance(text, str)},
    }


def _outcome(answer: object) -> Outcome:
    if not isinstance(answer, dict) or answer.get("kind") not in _KINDS:
        return Outcome("none")
    name = answer.get("name")
    return Outcome(answer["kind"], answer.get("value"), name[:_NAME] if isinstance(name, str) else "")
