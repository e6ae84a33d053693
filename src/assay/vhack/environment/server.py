"""Jobs for the inside of a sandbox, and the fork servers that perform them.

A fork server starts a process for a job in about a millisecond. It is started once for a process
and backend, takes jobs from any thread, and ends with the process, even where that is killed. Where
it cannot run, or dies under a job, the job has a sandbox of its own.
"""

import atexit
import fcntl
import json
import os
import platform
import selectors
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from assay.errors import BackendUnavailable
from assay.files.jsonl import dumps
from assay.vhack.environment.bubblewrap import command_line
from assay.vhack.environment.runs import Limits
from assay.vhack.environment.scratch import remove_folder
from assay.vhack.environment.system_calls import METADATA, seccomp_filter
from assay.vhack.environment.visible import PATH, inside, landlock_setup, python

_CHUNK = 65536
_START_SECONDS = 20
_END_SECONDS = 10
_STATUS_BYTES = 64
_LATE_ROUNDS = 64
_PREFIX = "assay-sandbox-"
_FULL = b"full"  # a status: the job kept more than it may
# A sandbox that works keeps a program from the source text of the tasks, beside this file.
_SECRET = str(Path(__file__).with_name("tasks.py"))
_TRIAL = f"""
try:
    open({_SECRET!r})
except OSError:
    print(1)
"""


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
    """Read every pipe to its end, until the deadline or an overflow.

    Where this process was late itself, a job that ended in time is not one that timed out: what
    waits in the pipes is read after the deadline too, in so many rounds that no job gains by it.
    """
    output = {name: bytearray() for name in pipes}
    late = 0
    overflowed = False
    with selectors.DefaultSelector() as selector:
        for name, (descriptor, _) in pipes.items():
            selector.register(descriptor, selectors.EVENT_READ, name)
        while selector.get_map() and not overflowed:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            late += time.monotonic() >= deadline
            if late > (_LATE_ROUNDS if ready else 0):
                break
            for key, _ in ready:
                read = output[key.data]
                bound = pipes[key.data][1]
                if not (chunk := os.read(key.fd, _CHUNK)):
                    selector.unregister(key.fd)
                read += chunk
                overflowed |= len(read) > bound
                del read[bound:]
        timed_out = bool(late and selector.get_map() and not overflowed)
    return Ended({name: bytes(read) for name, read in output.items()}, timed_out, overflowed)


class Server:
    """A running fork server in a sandbox. It raises OSError if it or its jobs do not start.

    Attributes:
        backend: What isolates its jobs.
        root: Where its jobs have their directories; empty for bubblewrap, where they are in memory.
        process: Process of the server, or of the bubblewrap around it.

    Args:
        backend: What isolates its jobs.
        disk_mib: Room for the files of a job in a bubblewrap that is for this job alone, and within
            which no namespaces are made; None makes them for each of many jobs.
    """

    def __init__(self, backend: str, disk_mib: int | None = None) -> None:
        self.backend = backend
        self.root = ""
        self._lock = threading.Lock()
        setup: dict[str, object] = {"backend": backend}
        line = []
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ExitStack() as undo:
            undo.enter_context(self._control)
            # The server has copies of what is passed, or did not start.
            with theirs, ExitStack() as ours:
                # A child that this process has forked keeps the socket open, but not the process
                # alive.
                parent = os.pidfd_open(os.getpid())
                ours.callback(os.close, parent)
                passed = [theirs.fileno(), parent]
                if backend != "bwrap":
                    setup |= landlock_setup() if backend == "landlock" else {}
                    remove_abandoned(Path(tempfile.gettempdir()))
                    self.root, lock = _make_root()
                    ours.callback(os.close, lock)
                    passed.append(lock)
                elif disk_mib is None:
                    line = command_line(1, server=True)
                else:
                    line = command_line(disk_mib)
                    setup = {"backend": "unsandboxed"}
                self.process = subprocess.Popen(
                    [*line, *python("-c", inside(), *map(str, passed[:2]))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={"PATH": PATH} if line else {},
                    cwd="/",
                    pass_fds=passed,
                    start_new_session=True,
                )
            undo.callback(self.close)
            self._begin(setup | {"root": self.root or "/work"})
            undo.pop_all()

    def _begin(self, setup: dict[str, object]) -> None:
        assert self.process.stdin is not None
        with self.process.stdin as pipe:
            pipe.write(json.dumps(setup).encode())
        self._control.settimeout(_START_SECONDS)
        if self._control.recv(16) != b"ready":
            raise OSError("the fork server did not start")
        self._control.settimeout(None)
        limits = Limits(seconds=_START_SECONDS)
        program = "print(1)" if self.backend == "unsandboxed" else _TRIAL
        ended = self.perform(job_text(program, limits, backend=self.backend), limits)
        if ended.returncode != 0 or not ended.output["stdout"]:
            raise OSError("the fork server does not run programs")

    def perform(self, job: bytes, limits: Limits) -> Ended:
        """Run a job, or raise an OSError if the server is gone."""
        deadline = time.monotonic() + limits.seconds
        with ExitStack() as ours:
            with ExitStack() as theirs:
                readers, passed = descriptors(job, limits, ours, theirs)
                status, inside = socket.socketpair()
                ours.enter_context(status)
                theirs.enter_context(inside)
                with self._lock:
                    socket.send_fds(
                        self._control, [str(limits.disk_mib).encode()], [*passed, inside.fileno()]
                    )
            watched = {"status": (status.fileno(), _STATUS_BYTES)}
            ended = pump(readers | watched, deadline)
            code = ended.output["status"]
            if ended.killed:
                status.shutdown(socket.SHUT_WR)
                code += pump(watched, time.monotonic() + _END_SECONDS).output["status"]
            if not code:
                # Whatever has become of it, it is replaced.
                self.process.kill()
                raise OSError("the fork server is gone")
        ended.overflowed |= code == _FULL
        ended.returncode = None if ended.killed else int(code)
        return ended

    def close(self) -> None:
        """End the server, and with it every job."""
        self._control.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_SECONDS)
        self.process.kill()
        self.process.wait()
        if self.root:
            with suppress(OSError):
                os.rmdir(self.root)  # noqa: PTH106


def _make_root() -> tuple[str, int]:
    """Make a directory for the jobs of a server; return its path and a descriptor that locks it."""
    hidden = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}")).resolve()
    lock = os.open(hidden, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    # Under its own name it is locked from the first moment: another process never takes it for
    # abandoned.
    return str(hidden.rename(hidden.with_name(hidden.name[1:]))), lock


def remove_abandoned(folder: Path) -> None:
    """Remove the directories of servers that were killed: no process holds their locks any more."""
    for root in folder.glob(f"{_PREFIX}*"):
        with ExitStack() as stack, suppress(OSError):
            lock = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # What another user made in a shared directory stays, also for root.
            if os.fstat(lock).st_uid == os.getuid():
                for job in root.iterdir():
                    remove_folder(str(job))
                root.rmdir()


servers: dict[tuple[int, str], Server | None] = {}  # by process and backend
_starting = threading.Lock()


def server(backend: str) -> Server | None:
    """Return the fork server of this process, or None if none can run; the first call starts it."""
    key = (os.getpid(), backend)
    with _starting:
        running = servers.get(key)
        if running is not None and running.process.poll() is not None:
            running.close()
            del servers[key]
        if key not in servers:
            servers[key] = None
            with suppress(OSError):
                servers[key] = Server(backend)
        return servers[key]


def perform(job: bytes, limits: Limits, *, backend: str) -> Ended:
    """Run a job by the fork server, or if that cannot, in a sandbox of its own.

    Raises:
        BackendUnavailable: The machine starts no sandbox now, or it ended under the job.
    """
    if (running := server(backend)) is not None:
        # A server that dies under a job does not lose it.
        with suppress(OSError):
            return running.perform(job, limits)
    # Where bubblewrap works, namespaces within its own may not.
    try:
        with closing(Server(backend, limits.disk_mib)) as fresh:
            return fresh.perform(job, limits)
    except OSError as error:
        raise BackendUnavailable(
            f"a sandbox that cannot run a program now: {error}",
            wanted="room for its processes, its memory and its descriptors",
            do="end other work or raise the limits (ulimit -a), and start again",
        ) from error


@atexit.register
def _close_servers() -> None:
    for (process, _), running in servers.items():
        if running is not None and process == os.getpid():
            running.close()
