"""The parent's side of the fork server: start it once, give it jobs from any thread, and end it with the process."""

import array
import atexit
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from assay.reports import dumps
from assay.vhack.environment._backends import PATH, command, source
from assay.vhack.environment._pump import Pumped, pump
from assay.vhack.environment._types import Limits

__all__ = ["Server", "server"]

_START_SECONDS = 20
_END_SECONDS = 10
_STATUS_BYTES = 64


class Server:
    """A running fork server inside one backend.

    Raises:
        OSError: it did not start, or its jobs do not.
    """

    def __init__(self, backend: str) -> None:
        self._lock = threading.Lock()
        self._control, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with inside:
            arguments = ["-c", source("_zygote.py"), str(inside.fileno()), source("_child.py")]
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
        job = {"nonce": "", "program": "print(1)", "stdin": "", "calls": [], "files": [], "seconds": _START_SECONDS}
        job |= {"memory_mib": limits.memory_mib, "disk_mib": limits.disk_mib}
        pumped, code = self.perform(dumps(job).encode(), limits)
        if code != 0 or pumped.output["stdout"] != b"1\n":
            raise OSError("the fork server does not run programs")

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def perform(self, job: bytes, limits: Limits) -> tuple[Pumped, int | None]:
        """Run a job; what came out and the exit code (−N for signal N), None if it was killed.

        Raises:
            OSError: the server is gone.
        """
        deadline = time.monotonic() + limits.seconds
        with _pipes() as pipes:
            self._send(job, pipes)
            bounds = {"stdout": limits.output_bytes, "stderr": limits.output_bytes, "report": limits.report_bytes}
            readers = {name: (pipes.readers[name], bound) for name, bound in bounds.items()}
            status = {"status": (pipes.readers["status"], _STATUS_BYTES)}
            pumped = pump(readers | status, deadline)
            code = pumped.output["status"]
            if pumped.timed_out or pumped.overflowed:
                pipes.let_go()
                code += pump(status, time.monotonic() + _END_SECONDS).output["status"]
            if not code:
                self._process.kill()  # whatever has become of it, it is replaced
                raise OSError("the fork server is gone")
        killed = pumped.timed_out or pumped.overflowed
        return pumped, None if killed else int(code)

    def _send(self, job: bytes, pipes: "_Pipes") -> None:
        """Hand the job over; the ends that the job has are closed here."""
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
        """End it, and with it every job."""
        self._control.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        self._process.kill()
        self._process.wait()


class _Pipes:
    """The pipes of one job: three that it writes to, the status, and the lifeline, which is cut by closing our end."""

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
    """The fork server of this process for a backend, started when it is first asked for; None if there can be none."""
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
