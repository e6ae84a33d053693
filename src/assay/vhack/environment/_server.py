"""The parent's side of a job: run it by the fork server, or in a sandbox of its own, and read its pipes with bounds.

A fork server is started once for a process and a backend, takes jobs from any thread, and ends with the process. Where
there can be no server, or it dies under a job, a sandbox is started for the one job and is gone with it.
"""

import array
import atexit
import os
import selectors
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import IO

from assay.reports import dumps
from assay.vhack.environment._backends import BACKENDS, PATH, command, source
from assay.vhack.environment._system_calls import seccomp_filter
from assay.vhack.environment._types import Call, Limits

_START_SECONDS = 20
_END_SECONDS = 10
_STATUS_BYTES = 64
_CHUNK = 65536


@dataclass(frozen=True, slots=True)
class Pumped:
    """What came out of a job.

    Attributes:
        output: Bytes read from each pipe, by its name, cut at the bound.
        timed_out: Whether the time ran out.
        overflowed: Whether a pipe held more than its bound.
    """

    output: dict[str, bytes]
    timed_out: bool
    overflowed: bool


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
    return dumps(
        {
            "nonce": nonce,
            "program": program,
            "stdin": stdin,
            "calls": [call.as_dict() for call in calls],
            "files": list(files),
            "stub": stub,
            "seconds": limits.seconds,
            "memory_mib": limits.memory_mib,
            "disk_mib": limits.disk_mib,
            "filter": _filter(),
        }
    ).encode()


@cache
def _filter() -> str:
    return seccomp_filter().hex()


def _pump(
    pipes: Mapping[str, tuple[int, int]], deadline: float, *, feed: tuple[IO[bytes], bytes] | None = None
) -> Pumped:
    """Read every pipe to its end, or until the deadline or an overflow.

    Args:
        pipes: Descriptor and bound in bytes by the name of the pipe.
        deadline: Time of `time.monotonic` at which reading stops.
        feed: A pipe to write to meanwhile, and the bytes for it; it is closed after them.
    """
    output = {name: bytearray() for name in pipes}
    timed_out = overflowed = False
    with selectors.DefaultSelector() as selector:
        for name, (descriptor, _) in pipes.items():
            selector.register(descriptor, selectors.EVENT_READ, name)
        pending = memoryview(b"")
        if feed is not None:
            os.set_blocking(feed[0].fileno(), False)
            selector.register(feed[0], selectors.EVENT_WRITE, None)
            pending = memoryview(feed[1])
        while selector.get_map() and not overflowed:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if timed_out := time.monotonic() >= deadline:
                break
            for key, _ in ready:
                if key.data is not None:
                    overflowed |= _drain(selector, key.fd, output[key.data], pipes[key.data][1])
                elif feed is not None:
                    pending = _feed(selector, feed[0], pending)
    return Pumped({name: bytes(read) for name, read in output.items()}, timed_out, overflowed)


def _feed(selector: selectors.BaseSelector, stdin: IO[bytes], pending: memoryview) -> memoryview:
    try:
        pending = pending[os.write(stdin.fileno(), pending[:_CHUNK]) :]
    except BrokenPipeError:
        pending = pending[:0]
    if not pending:
        selector.unregister(stdin)
        stdin.close()
    return pending


def _drain(selector: selectors.BaseSelector, descriptor: int, read: bytearray, bound: int) -> bool:
    """Read what is there, keep no more than the bound, and return whether there was more."""
    chunk = os.read(descriptor, _CHUNK)
    if not chunk:
        selector.unregister(descriptor)
    read += chunk
    if len(read) <= bound:
        return False
    del read[bound:]
    return True


class Server:
    """A running fork server inside one backend.

    Args:
        backend: Name in ``BACKENDS``.

    Raises:
        OSError: The server did not start, or its jobs do not.
    """

    def __init__(self, backend: str) -> None:
        self._lock = threading.Lock()
        self._control, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with inside:
            arguments = ["-c", source("_inside.py"), "serve", str(inside.fileno())]
            self._process = subprocess.Popen(
                command(backend, 1, arguments, server=True),
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
        pumped, code = self.perform(job_text("print(1)", limits), limits)
        if code != 0 or pumped.output["stdout"] != b"1\n":
            raise OSError("the fork server does not run programs")

    @property
    def alive(self) -> bool:
        """Whether the server still runs."""
        return self._process.poll() is None

    def perform(self, job: bytes, limits: Limits) -> tuple[Pumped, int | None]:
        """Run a job.

        Args:
            job: The job as `job_text` writes it.
            limits: Bounds of the job.

        Returns:
            What came out, and the exit code: −N for signal N, None if the job was killed from here.

        Raises:
            OSError: The server is gone.
        """
        deadline = time.monotonic() + limits.seconds
        with _pipes() as pipes:
            self._send(job, pipes)
            bounds = {"stdout": limits.output_bytes, "stderr": limits.output_bytes, "report": limits.report_bytes}
            readers = {name: (pipes.readers[name], bound) for name, bound in bounds.items()}
            status = {"status": (pipes.readers["status"], _STATUS_BYTES)}
            pumped = _pump(readers | status, deadline)
            code = pumped.output["status"]
            if pumped.timed_out or pumped.overflowed:
                pipes.let_go()
                code += _pump(status, time.monotonic() + _END_SECONDS).output["status"]
            if not code:
                self._process.kill()  # whatever has become of it, it is replaced
                raise OSError("the fork server is gone")
        killed = pumped.timed_out or pumped.overflowed
        return pumped, None if killed else int(code)

    def _send(self, job: bytes, pipes: "_Pipes") -> None:
        """Hand the job over, and close here the ends of the pipes that the job has."""
        descriptor = os.memfd_create("job")
        try:
            with open(os.dup(descriptor), "wb") as file:  # noqa: PTH123
                file.write(job)
            os.lseek(descriptor, 0, os.SEEK_SET)
            numbers = array.array("i", [descriptor, *pipes.given])
            with self._lock:
                self._control.sendmsg([b"j"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)])
        finally:
            os.close(descriptor)
            pipes.close_given()

    def close(self) -> None:
        """End the server, and with it every job."""
        self._control.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        self._process.kill()
        self._process.wait()


class _Pipes:
    """The pipes of one job: three that it writes to, the status, and the lifeline, which is cut by closing this end."""

    def __init__(self) -> None:
        self.readers: dict[str, int] = {}
        self.given: list[int] = []
        self._lifeline = -1

    def open(self) -> None:
        for name in ("stdout", "stderr", "report", "status"):
            self.readers[name], writer = os.pipe()
            self.given.append(writer)
        other, self._lifeline = os.pipe()
        self.given.append(other)

    def close_given(self) -> None:
        while self.given:
            os.close(self.given.pop())

    def let_go(self) -> None:
        """Cut the lifeline: the job is killed."""
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1


@contextmanager
def _pipes() -> Iterator[_Pipes]:
    pipes = _Pipes()
    try:
        pipes.open()
        yield pipes
    finally:
        pipes.let_go()
        pipes.close_given()
        for reader in pipes.readers.values():
            os.close(reader)


_servers: dict[tuple[int, str], Server | None] = {}
_starting = threading.Lock()


def server(backend: str) -> Server | None:
    """Return the fork server of this process for a backend, or None if none can run; the first call starts it."""
    key = (os.getpid(), backend)
    with _starting:
        found = _servers.get(key)
        if key not in _servers or (found is not None and not found.alive):
            if found is not None:
                found.close()
            _servers[key] = _start(backend)
        return _servers[key]


def _start(backend: str) -> Server | None:
    try:
        return Server(backend)
    except OSError:
        return None


@atexit.register
def _close_all() -> None:
    for (process, _), found in _servers.items():
        if found is not None and process == os.getpid():
            found.close()


def perform_once(backend: str, job: bytes, limits: Limits) -> tuple[Pumped, int | None]:
    """Run a job in a sandbox of its own, or in no sandbox; returns what `Server.perform` returns."""
    reader, writer = os.pipe()
    deadline = time.monotonic() + limits.seconds
    try:
        with _directory(backend) as directory:
            try:
                process = subprocess.Popen(
                    command(backend, limits.disk_mib, ["-c", source("_inside.py"), "once", str(writer)]),
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
    pumped = _pump(pipes, deadline, feed=(process.stdin, job))
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
    """Yield where the process starts: any directory for a sandbox, which has its own, else a throw-away one."""
    if backend in BACKENDS:
        yield "/"
        return
    with tempfile.TemporaryDirectory(prefix="assay-", ignore_cleanup_errors=True) as path:
        yield path
