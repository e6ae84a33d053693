"""One sandbox for one job: started for it, and gone with it. What a fork server is the fast form of."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from assay.vhack.environment._backends import BACKENDS, PATH, command, source
from assay.vhack.environment._pump import Pumped, pump
from assay.vhack.environment._types import Limits

__all__ = ["perform_once"]


def perform_once(backend: str, job: bytes, limits: Limits) -> tuple[Pumped, int | None]:
    """Run a job in a backend, or in none; what came out and the exit code, None if it was killed."""
    reader, writer = os.pipe()
    deadline = time.monotonic() + limits.seconds
    try:
        with _directory(backend) as directory:
            try:
                process = subprocess.Popen(
                    command(backend, limits.disk_mib, ["-c", source("_child.py"), str(writer)]),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env={"PATH": PATH} if backend in BACKENDS else {},
                    cwd=directory,
                    pass_fds=(writer,),
                    start_new_session=True,
                )
            finally:
                os.close(writer)
            with process:
                return _follow(process, reader, job, limits, deadline)
    finally:
        os.close(reader)


def _follow(
    process: "subprocess.Popen[bytes]", reader: int, job: bytes, limits: Limits, deadline: float
) -> tuple[Pumped, int | None]:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    pipes = {
        "stdout": (process.stdout.fileno(), limits.output_bytes),
        "stderr": (process.stderr.fileno(), limits.output_bytes),
        "report": (reader, limits.report_bytes),
    }
    pumped = pump(pipes, deadline, feed=(process.stdin, job))
    late = pumped.timed_out or (not pumped.overflowed and not _ends(process, deadline))
    # The leader may be gone while a child of it lives; the group is named after it until it is waited for and empty.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    killed = late or pumped.overflowed
    return Pumped(pumped.output, late, pumped.overflowed), None if killed else process.returncode


def _ends(process: "subprocess.Popen[bytes]", deadline: float) -> bool:
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


@contextmanager
def _directory(backend: str) -> Iterator[str]:
    """Where the process starts: a throw-away directory without a sandbox, else any, as the sandbox has its own."""
    if backend in BACKENDS:
        yield "/"
        return
    with tempfile.TemporaryDirectory(prefix="assay-", ignore_cleanup_errors=True) as path:
        yield path
