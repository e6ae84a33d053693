"""A job for the inside of a sandbox: its text, its pipes, and how it ended."""

import os
import platform
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass

from assay.files.jsonl import dumps
from assay.vhack.environment.bubblewrap import command_line
from assay.vhack.environment.runs import Limits
from assay.vhack.environment.system_calls import METADATA, seccomp_filter
from assay.vhack.environment.visible import PATH, inside, python

_CHUNK = 65536


@dataclass(slots=True)
class Ended:
    """How a job ended."""

    output: dict[str, bytes]  # of each pipe by its name, cut at the bound
    timed_out: bool
    overflowed: bool  # a pipe held more than its bound
    returncode: int | None = (
        None  # −N for signal N; None if the job was killed for its time or its output
    )

    @property
    def killed(self) -> bool:
        """Whether the job had to be ended from here."""
        return self.timed_out or self.overflowed


def job_text(program: str, limits: Limits, *, backend: str, **details: object) -> bytes:
    """Return a job as JSON; the report has to repeat the nonce, and the rest is what `run`
    takes.
    """
    nothing: dict[str, object] = {"nonce": "", "stdin": "", "calls": [], "files": [], "stub": None}
    without = METADATA if backend == "landlock" else ()
    code = seccomp_filter(platform.machine(), without=without).hex()
    return dumps(nothing | details | {"program": program, "filter": code} | asdict(limits)).encode()


def descriptors(
    job: bytes, limits: Limits, ours: ExitStack, theirs: ExitStack
) -> tuple[dict[str, tuple[int, int]], list[int]]:
    """Return the pipes to read with their bounds, and the descriptors that the job closes.

    A job is given its text, stdout, stderr and the report.
    """
    text = os.memfd_create("job")
    theirs.callback(os.close, text)
    with os.fdopen(text, "wb", closefd=False) as file:
        file.write(job)
    os.lseek(text, 0, os.SEEK_SET)
    readers = {}
    passed = [text]
    bounds = {
        "stdout": limits.output_bytes,
        "stderr": limits.output_bytes,
        "report": limits.report_bytes,
    }
    for name, bound in bounds.items():
        reader, writer = os.pipe()
        ours.callback(os.close, reader)
        theirs.callback(os.close, writer)
        readers[name] = (reader, bound)
        passed.append(writer)
    return readers, passed


def pump(pipes: Mapping[str, tuple[int, int]], deadline: float) -> Ended:
    """Read every pipe to its end, until the deadline or an overflow."""
    output = {name: bytearray() for name in pipes}
    timed_out = overflowed = False
    with selectors.DefaultSelector() as selector:
        for name, (descriptor, _) in pipes.items():
            selector.register(descriptor, selectors.EVENT_READ, name)
        while selector.get_map() and not overflowed:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if timed_out := time.monotonic() >= deadline:
                break
            for key, _ in ready:
                read = output[key.data]
                bound = pipes[key.data][1]
                if not (chunk := os.read(key.fd, _CHUNK)):
                    selector.unregister(key.fd)
                read += chunk
                overflowed |= len(read) > bound
                del read[bound:]
    return Ended({name: bytes(read) for name, read in output.items()}, timed_out, overflowed)


def perform_once(job: bytes, limits: Limits) -> Ended:
    """Run a job in a bubblewrap of its own."""
    deadline = time.monotonic() + limits.seconds
    with ExitStack() as ours:
        with ExitStack() as theirs:
            readers, (text, stdout, stderr, report) = descriptors(job, limits, ours, theirs)
            parent = os.pidfd_open(os.getpid())
            theirs.callback(os.close, parent)
            arguments = ("once", str(report), str(parent))
            process = subprocess.Popen(
                [*command_line(limits.disk_mib), *python("-c", inside(), *arguments)],
                stdin=text,
                stdout=stdout,
                stderr=stderr,
                env={"PATH": PATH},
                cwd="/",
                pass_fds=(report, parent),
                start_new_session=True,
            )
        try:
            ended = pump(readers, deadline)
            if not ended.killed:
                process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            ended.timed_out = True
        finally:
            # The leader may be gone while a child of it lives; the group keeps its number until it
            # is empty.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        ended.returncode = None if ended.killed else process.returncode
        return ended
