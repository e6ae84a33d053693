"""The parent's side of a job: run it by the fork server, or in a sandbox of its own, and read its pipes with bounds.

A fork server is started once for a process and a backend, takes jobs from any thread, and ends with the process. Where
there can be no server, or it dies under a job, a sandbox is started for the one job and is gone with it.
"""

import atexit
import os
import platform
import selectors
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from assay.files.jsonl import dumps
from assay.vhack.environment.backends import BACKENDS, PATH, command, seccomp_filter
from assay.vhack.environment.types import Call, Limits

_INSIDE = Path(__file__).with_name("inside.py").read_text(encoding="utf-8")
_START_SECONDS = 20
_END_SECONDS = 10
_STATUS_BYTES = 64
_CHUNK = 65536


@dataclass(slots=True)
class Ended:
    """How a job ended.

    Attributes:
        output: Bytes read from each pipe, by its name, cut at the bound.
        timed_out: Whether the time ran out.
        overflowed: Whether a pipe held more than its bound.
        returncode: Exit code, −N for signal N; None if the job was killed for its time or its output.
    """

    output: dict[str, bytes]
    timed_out: bool
    overflowed: bool
    returncode: int | None = None

    @property
    def killed(self) -> bool:
        """Whether the job had to be ended from here."""
        return self.timed_out or self.overflowed


def job_text(
    program: str,
    limits: Limits,
    *,
    nonce: str = "",
    stdin: str = "",
    calls: Sequence[Call] = (),
    files: Sequence[str] = (),
    stub: tuple[str, object] | None = None,
) -> bytes:
    """Return a job as JSON; the report has to repeat the nonce, and the rest is what `sandbox.run` takes."""
    job = {
        "nonce": nonce,
        "program": program,
        "stdin": stdin,
        "calls": [call.as_dict() for call in calls],
        "files": list(files),
        "stub": stub,
        "filter": seccomp_filter(platform.machine()).hex(),
    }
    return dumps(job | asdict(limits)).encode()


def _descriptors(
    job: bytes, limits: Limits, ours: ExitStack, theirs: ExitStack
) -> tuple[dict[str, tuple[int, int]], list[int]]:
    """Return descriptor and bound of each pipe to read, by its name, and what the job is given.

    A job is given its text, stdout, stderr and the report. The stack ``theirs`` closes these here once the job has
    them, and the stack ``ours`` closes the ends to read.
    """
    text = os.memfd_create("job")
    theirs.callback(os.close, text)
    with os.fdopen(text, "wb", closefd=False) as file:
        file.write(job)
    os.lseek(text, 0, os.SEEK_SET)
    readers, given = {}, [text]
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
        given.append(writer)
    return readers, given


def _pump(pipes: Mapping[str, tuple[int, int]], deadline: float) -> Ended:
    """Read every pipe, given by descriptor and bound, to its end, or until the deadline or an overflow."""
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
                read, bound = output[key.data], pipes[key.data][1]
                chunk = os.read(key.fd, _CHUNK)
                if not chunk:
                    selector.unregister(key.fd)
                read += chunk
                overflowed |= len(read) > bound
                del read[bound:]
    return Ended({name: bytes(read) for name, read in output.items()}, timed_out, overflowed)


class Server:
    """A running fork server inside the backend of that name. It raises OSError if it or its jobs do not start."""

    def __init__(self, backend: str) -> None:
        self._lock = threading.Lock()
        self._control, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with inside:
            self._process = subprocess.Popen(
                command(backend, 1, ["-c", _INSIDE, "serve", str(inside.fileno())], server=True),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"PATH": PATH},
                cwd="/",
                pass_fds=(inside.fileno(),),
                start_new_session=True,
            )
        try:
            self._check()
        except OSError:
            self.close()
            raise

    def _check(self) -> None:
        self._control.settimeout(_START_SECONDS)
        if self._control.recv(16) != b"ready":
            raise OSError("the fork server did not start")
        self._control.settimeout(None)
        limits = Limits(seconds=_START_SECONDS)
        ended = self.perform(job_text("print(1)", limits), limits)
        if ended.returncode != 0 or ended.output["stdout"] != b"1\n":
            raise OSError("the fork server does not run programs")

    @property
    def alive(self) -> bool:
        """Whether the server still runs."""
        return self._process.poll() is None

    def perform(self, job: bytes, limits: Limits) -> Ended:
        """Run a job as `job_text` writes it, or raise an OSError if the server is gone.

        A socket of its own tells how the job ended. Shutting it from here ends the job.
        """
        deadline = time.monotonic() + limits.seconds
        with ExitStack() as ours:
            with ExitStack() as theirs:
                readers, given = _descriptors(job, limits, ours, theirs)
                status, inside = socket.socketpair()
                ours.enter_context(status)
                theirs.enter_context(inside)
                with self._lock:
                    socket.send_fds(self._control, [b"j"], [*given, inside.fileno()])
            watched = {"status": (status.fileno(), _STATUS_BYTES)}
            ended = _pump(readers | watched, deadline)
            code = ended.output["status"]
            if ended.killed:
                status.shutdown(socket.SHUT_WR)
                code += _pump(watched, time.monotonic() + _END_SECONDS).output["status"]
            if not code:
                self._process.kill()  # whatever has become of it, it is replaced
                raise OSError("the fork server is gone")
        ended.returncode = None if ended.killed else int(code)
        return ended

    def close(self) -> None:
        """End the server, and with it every job."""
        self._control.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        self._process.kill()
        self._process.wait()


_servers: dict[tuple[int, str], Server | None] = {}
_starting = threading.Lock()


def server(backend: str) -> Server | None:
    """Return the fork server of this process for a backend, or None if none can run; the first call starts it."""
    key = (os.getpid(), backend)
    with _starting:
        found = _servers.get(key)
        if found is not None and not found.alive:
            found.close()
            del _servers[key]
        if key not in _servers:
            _servers[key] = None
            with suppress(OSError):
                _servers[key] = Server(backend)
        return _servers[key]


@atexit.register
def _close_all() -> None:
    for (process, _), found in _servers.items():
        if found is not None and process == os.getpid():
            found.close()


def perform_once(backend: str, job: bytes, limits: Limits) -> Ended:
    """Run a job in a sandbox of its own, or in no sandbox."""
    deadline = time.monotonic() + limits.seconds
    with ExitStack() as ours:
        environment, directory = {"PATH": PATH}, "/"
        if backend not in BACKENDS:  # no sandbox, which would bring an environment and a directory of its own
            temporary = tempfile.TemporaryDirectory(prefix="assay-sandbox-", ignore_cleanup_errors=True)
            environment, directory = {}, ours.enter_context(temporary)
        with ExitStack() as theirs:
            readers, (text, stdout, stderr, report) = _descriptors(job, limits, ours, theirs)
            process = subprocess.Popen(
                command(backend, limits.disk_mib, ["-c", _INSIDE, "once", str(report)]),
                stdin=text,
                stdout=stdout,
                stderr=stderr,
                env=environment,
                cwd=directory,
                pass_fds=(report,),
                start_new_session=True,
            )
        try:
            ended = _pump(readers, deadline)
            if not ended.killed:
                process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            ended.timed_out = True
        finally:
            # The leader may be gone while a child of it lives; the group keeps its number until it is empty.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        ended.returncode = None if ended.killed else process.returncode
        return ended
