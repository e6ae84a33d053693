"""Run a program that no one has read, and learn from outside what it does.

Covered: files (a read-only part of the machine, and one small directory), network, other processes,
capabilities, system calls (an allow list), time, memory, output, the length of program and report.
Not covered: faults of the kernel, and what a program says of itself. It shares a process with the
harness, so a report is never believed: the parent compares *values*, and what it compares them with
never enters the sandbox. Without a sandbox (``allow_unsandboxed``) only limits, an empty
environment and the filter of system calls are left: the program reads and writes this machine's
files with the rights of the user.
"""

import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from assay.errors import DataError
from assay.files.jsonl import loads
from assay.vhack.environment.backends import choose_backend
from assay.vhack.environment.runs import NOT_COMPARED, Call, Limits, Outcome, Result
from assay.vhack.environment.scratch import FILE_CHARACTERS
from assay.vhack.environment.server import job_text, perform

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
    backend: str | None = None,
) -> Result:
    """Run a Python program in the sandbox, then ask it questions.

    The program runs as ``__main__`` in an empty writable directory. If it ends, normally or by
    ``sys.exit``, the calls are made in order in the same process; whether it raised, printed,
    exited or hung is in the result, never an exception here. A program that is longer than its
    limit or has no UTF-8 form is not run.

    Args:
        program: Source text.
        stdin: Text that the program can read.
        calls: Questions to it, see `Call`.
        files: Names in its working directory whose content is wanted.
        stub: Name and value: before the program runs, every function of that name is given the body
            ``return value``.
        limits: Bounds of the run, by default `Limits`.
        allow_unsandboxed: Whether to run without a sandbox where no backend works. The program can
            then read and write this machine's files.
        backend: ``bwrap``, ``landlock`` or ``unsandboxed``; by default the first that works here.

    Raises:
        BackendUnavailable: No sandbox can be used here, and ``allow_unsandboxed`` is not set, or
            this machine has no room for one now.
        UsageError: Arguments are not JSON.
    """
    limits = limits or Limits()
    backend = choose_backend(backend, allow_unsandboxed=allow_unsandboxed)
    try:
        refused = "ProgramTooLong" if len(program.encode()) > limits.program_bytes else ""
    except UnicodeEncodeError as error:
        refused = type(error).__name__
    if refused:
        answers = (Outcome("none"),) * len(calls)
        return Result(1, "", f"{refused}\n", raised=refused, outcomes=answers, backend=backend)
    nonce = secrets.token_hex(16)
    questions = [
        {"target": call.target, "args": call.args}
        | ({} if call.equals is NOT_COMPARED else {"equals": call.equals})
        for call in calls
    ]
    job = job_text(
        program,
        limits,
        backend=backend,
        nonce=nonce,
        stdin=stdin,
        calls=questions,
        files=list(files),
        stub=stub,
    )
    started = time.monotonic()
    ended = perform(job, limits, backend=backend)
    report = parse_report(ended.output["report"], nonce, len(calls), files)
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


def parse_report(
    line: bytes, nonce: str, n_calls: int, asked: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the content of a report; malformed bytes, which a program can write, say nothing."""
    parsed: dict[str, Any] = {}
    with suppress(DataError, RecursionError, MemoryError):
        parsed = loads(line, "report of the sandbox")
    if parsed.get("nonce") != nonce:
        parsed = {}
    answers = parsed.get("outcomes")
    raised = parsed.get("raised")
    files = parsed.get("files")
    outcomes = (
        [_outcome(answer) for answer in answers[:n_calls]] if isinstance(answers, list) else []
    )
    outcomes += [Outcome("none")] * (n_calls - len(outcomes))
    texts = files if isinstance(files, dict) else {}
    return {
        "finished": parsed.get("finished") is True,
        "raised": raised[:_NAME] if isinstance(raised, str) else "",
        "outcomes": tuple(outcomes),
        "files": {
            name: text[:FILE_CHARACTERS]
            for name in asked
            if isinstance(text := texts.get(name), str)
        },
    }


def _outcome(answer: object) -> Outcome:
    if not isinstance(answer, dict) or answer.get("kind") not in _KINDS:
        return Outcome("none")
    name = answer.get("name")
    return Outcome(
        answer["kind"], answer.get("value"), name[:_NAME] if isinstance(name, str) else ""
    )
