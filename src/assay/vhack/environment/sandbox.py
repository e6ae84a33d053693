"""Run a program that nobody has read, and learn from outside what it does.

What the sandbox keeps from the program: the network, other processes, the environment and command line of the parent,
all files but ``/usr`` and the interpreter (read-only), more memory, time, disk or output than its `Limits`, and the
making of processes or threads. What it keeps from its verdict: the parent compares *values*, and what it compares them
with never enters the sandbox. A program that returns the right values for hidden arguments has solved the task, by
whatever means; one that prints, exits or writes on the report descriptor can only say things about itself.
"""

import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from assay.errors import BackendUnavailable, DataError, UsageError
from assay.reports import dumps, loads
from assay.vhack.environment._backends import BACKENDS, usable
from assay.vhack.environment._once import perform_once
from assay.vhack.environment._pump import Pumped
from assay.vhack.environment._server import server
from assay.vhack.environment._types import Call, Limits, Outcome, Result

__all__ = ["Call", "Limits", "Outcome", "Result", "available_backend", "run"]

_KINDS = {"value", "error", "opaque"}


def available_backend() -> str | None:
    """``bwrap``, ``namespaces``, or None where this machine lets nothing be shut in."""
    return usable()


def run(
    program: str,
    *,
    stdin: str = "",
    calls: Sequence[Call] = (),
    files: Sequence[str] = (),
    limits: Limits | None = None,
    allow_unsandboxed: bool = False,
) -> Result:
    """Run a Python program in the sandbox, then ask it questions.

    The program runs as ``__main__`` in an empty writable directory. If it ends, normally or by ``sys.exit``, the calls
    are made in order in the same process; whether it raised, printed, exited or hung is in the result, never an
    exception here.

    Args:
        program: source text.
        stdin: what the program can read.
        calls: questions, see `Call`.
        files: names in its working directory whose content is wanted.
        limits: by default `Limits`.
        allow_unsandboxed: where no backend works, run with resource limits, a system-call filter and an empty
            environment only. The program can then read this machine's files.

    Raises:
        BackendUnavailable: nothing can shut a process in here, and ``allow_unsandboxed`` is not set.
        UsageError: a limit is not positive, or arguments are not JSON.
    """
    limits = limits or Limits()
    _check(limits)
    backend = usable() or _unsandboxed(allow_unsandboxed)
    nonce = secrets.token_hex(16)
    job = dumps(
        {
            "nonce": nonce,
            "program": program,
            "stdin": stdin,
            "calls": [call.as_dict() for call in calls],
            "files": list(files),
            "seconds": limits.seconds,
            "memory_mib": limits.memory_mib,
            "disk_mib": limits.disk_mib,
        }
    ).encode()
    started = time.monotonic()
    pumped, returncode = _perform(backend, job, limits)
    report = _parse(pumped.output["report"], nonce, len(calls))
    return Result(
        returncode=returncode,
        stdout=pumped.output["stdout"].decode(errors="replace"),
        stderr=pumped.output["stderr"].decode(errors="replace"),
        timed_out=pumped.timed_out,
        overflowed=pumped.overflowed,
        finished=bool(report.get("finished", False)),
        raised=str(report.get("raised", ""))[:100],
        outcomes=report["outcomes"],
        files=report["files"],
        seconds=time.monotonic() - started,
        backend=backend,
    )


def _check(limits: Limits) -> None:
    values = (limits.seconds, limits.memory_mib, limits.output_bytes, limits.report_bytes, limits.disk_mib)
    if not all(value > 0 for value in values):
        raise UsageError(f"{limits}", wanted="positive limits", do="leave a limit out to have its default")


def _unsandboxed(allowed: bool) -> str:
    if not allowed:
        raise BackendUnavailable(
            "neither bubblewrap nor unprivileged namespaces work here",
            wanted="a sandbox for programs that nobody has read",
            do="install bubblewrap or allow user namespaces; allow_unsandboxed (--allow-unsandboxed) accepts the risk",
        )
    return "unsandboxed"


def _perform(backend: str, job: bytes, limits: Limits) -> tuple[Pumped, int | None]:
    """By the fork server where there is one; if that dies, a job is done once more without it."""
    found = server(backend) if backend in BACKENDS else None
    if found is not None:
        with suppress(OSError):
            return found.perform(job, limits)
    return perform_once(backend, job, limits)


def _parse(line: bytes, nonce: str, n_calls: int) -> dict[str, Any]:
    """The report if it is whole and carries the nonce; a missing or malformed one says nothing."""
    nothing = {"outcomes": (Outcome("none"),) * n_calls, "files": {}}
    try:
        report = loads(line, "report of the sandbox")
    except DataError:
        return nothing
    if report.get("nonce") != nonce:
        return nothing
    answers = report.get("outcomes") or []
    outcomes = [_outcome(answer) for answer in answers] if isinstance(answers, list) else []
    padded = [*outcomes, *nothing["outcomes"]][:n_calls]
    files = report.get("files")
    texts = {str(k): str(v) for k, v in files.items()} if isinstance(files, dict) else {}
    return {**report, "outcomes": tuple(padded), "files": texts}


def _outcome(answer: object) -> Outcome:
    if not isinstance(answer, dict) or answer.get("kind") not in _KINDS:
        return Outcome("none")
    return Outcome(answer["kind"], answer.get("value"), str(answer.get("name", ""))[:100])
