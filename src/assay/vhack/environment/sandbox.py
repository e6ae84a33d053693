"""Run a program that no one has read, and learn from outside what it does.

Covered: files (a read-only root and one small directory in memory), network, other processes,
    capabilities, system
calls (an allow list), time, memory, output, the length of program and report. Not covered: faults
of the kernel, and what a program says of itself. It shares a process with the harness, so a report
is never believed: the parent compares *values*, and what it compares them with never enters the
sandbox. Without a sandbox (``allow_unsandboxed``) only limits, an empty environment and the filter
of system calls are left: the program reads and writes this machine's files with the rights of the
user.
"""

import atexit
import csv
import os
import platform
import secrets
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

from assay.errors import BackendUnavailable, DataError, UsageError
from assay.files.jsonl import dumps, loads

Case = tuple[tuple[Any, ...], Any]
"""Arguments and expected value of one test."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: Wall clock from start to end, start of the interpreter included; CPU seconds are
            bounded by it too.
        memory_mib: Address space of the one process, in MiB.
        output_bytes: Bytes of stdout and of stderr each; a program that writes more is stopped.
        report_bytes: Bytes of everything it returns by value.
        disk_mib: Room in its working directory, in MiB; also the largest file.
        program_bytes: Length of its source text in UTF-8; a longer program is not run.

    Raises:
        UsageError: A limit is not positive.
    """

    seconds: float = 5.0
    memory_mib: int = 512
    output_bytes: int = 65536
    report_bytes: int = 1 << 20
    disk_mib: int = 8
    program_bytes: int = 1 << 16

    def __post_init__(self) -> None:
        if not all(value > 0 for value in asdict(self).values()):
            raise UsageError(
                f"{self}", wanted="positive limits", do="leave a limit out to have its default"
            )


class Bounds(TypedDict, total=False):
    """How a program is run, see `run`."""

    limits: Limits | None
    allow_unsandboxed: bool


_NOTHING: Any = object()


@dataclass(frozen=True, slots=True)
class Call:
    """One question to a program after it has run: a call, or with ``args`` None the value of a
    name.

    Attributes:
        target: A name at module level, or ``Class.method`` (the class is instantiated without
            arguments), or ``name.attribute``.
        args: Positional arguments, of JSON types; None reads the target instead of calling it.
        equals: Where it is given, the answer is whether ``result == equals`` by the program's own
            ``==``.
    """

    target: str
    args: tuple[Any, ...] | None = None
    equals: Any = _NOTHING


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer to one `Call`.

    Attributes:
        kind: One of ``value``; ``error``, the target raised or is missing; ``opaque``, a result
            that is not made of plain builtin values; ``none``, the program ended before it was
            asked.
        value: Plain value, for ``value``. Tuples come back as lists, subclasses as the builtin
            value below them.
        name: Type of the exception or of the opaque result.
    """

    kind: str
    value: Any = None
    name: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """What one run left behind, as seen by the parent.

    Attributes:
        returncode: Exit code of the program; None where it was killed.
        stdout: Its output, cut at the limit; bytes that are not UTF-8 are replaced.
        stderr: Its error output, likewise.
        timed_out: Whether it was killed at the time limit.
        overflowed: Whether it was killed because it printed or returned too much.
        finished: Whether it ran to its end or left by ``sys.exit``, and the questions were asked.
        raised: Name of the exception that ended it, or empty; ``ProgramTooLong`` or
            ``UnicodeEncodeError`` if it was not run.
        outcomes: One answer per call.
        files: Content of the files asked for that exist, at most 4096 characters each.
        seconds: Wall clock.
        backend: ``bwrap`` or ``unsandboxed``.
    """

    returncode: int | None
    stdout: str = ""
    stderr: str = ""
    timed_out: bool = False
    overflowed: bool = False
    finished: bool = False
    raised: str = ""
    outcomes: tuple[Outcome, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    backend: str = ""


# The table system_calls.csv is an allow list: whatever it does not name fails with EPERM. It holds
# what CPython and its standard library need for one process that computes and keeps files in its
# own directory.

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The machines that the table has numbers for, with the constant by which the kernel names each to
a filter.
"""

with Path(__file__).with_name("system_calls.csv").open(encoding="utf-8") as _file:
    _ROWS = list(csv.DictReader(_file))
ALLOWED = {
    machine: {row["name"]: int(row[machine]) for row in _ROWS if row[machine]}
    for machine in ARCHITECTURES
}
"""The number of every permitted system call by machine and name; the table has no number where a
machine lacks it.
"""

RESTRICTED: dict[str, tuple[int, tuple[int, ...]]] = {
    "fcntl": (
        1,
        (0, 1, 2, 3, 4, 1030),
    ),  # duplicate, flags; not locks, leases, notification or the size of pipes
    # Whether it is a terminal, its size, flags, and how many bytes wait.
    "ioctl": (1, (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
    "futex": (
        1,
        (128, 129, 137, 138, 393),
    ),  # private ones only: others meet in files that two jobs can map
    "madvise": (
        2,
        (0, 1, 2, 3, 4, 8, 14, 15),
    ),  # not those that push pages of shared files out of memory
    "prlimit64": (0, (0,)),  # its own limits, which it cannot raise
}
"""Calls that are permitted for some values of one argument: the position of the argument, and the
values.
"""

_NEWEST = 452
_X32 = 0x40000000  # numbers from here on are the x32 variants of the calls of x86_64
_LOAD = 0x20
_EQUAL = 0x15
_ABOVE = 0x25
_AT_LEAST = 0x35
_RETURN = 0x06
_ALLOW = 0x7FFF0000
_EPERM = 0x00050001
_ENOSYS = 0x00050026
_KILL = 0x80000000
_NUMBER = 0
_ARCHITECTURE = 4
_ARGUMENTS = 16  # offsets in the kernel's struct seccomp_data


@cache
def seccomp_filter(machine: str) -> bytes:
    """Return the filter for a name in ``ARCHITECTURES`` as the kernel takes it: instructions of
    classic BPF.

    A call from another architecture kills the process. Calls newer than the table fail with ENOSYS,
    so that a newer C library falls back to an older call; all others that are not permitted fail
    with EPERM. Every instruction has eight bytes: code (u16), jump if true (u8), jump if false (u8)
    and operand (u32), little-endian.
    """
    if machine not in ARCHITECTURES:
        raise BackendUnavailable(
            f"no filter of system calls for {machine}",
            wanted=" or ".join(ARCHITECTURES),
            do="run it on such a machine",
        )
    allow = (_RETURN, 0, 0, _ALLOW)
    refuse = (_RETURN, 0, 0, _EPERM)
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL),
    ]
    program += [(_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _X32), refuse]
    program += [(_ABOVE, 0, 1, _NEWEST), (_RETURN, 0, 0, _ENOSYS)]
    for name, number in ALLOWED[machine].items():
        permitted = [allow]
        if name in RESTRICTED:
            argument, values = RESTRICTED[name]
            # The kernel itself looks at the lower half of these arguments only.
            permitted = [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument)]
            for value in values:
                permitted += [(_EQUAL, 0, 1, value), allow]
            permitted.append(refuse)
        program += [(_EQUAL, 0, len(permitted), number), *permitted]
    program.append(refuse)
    return b"".join(struct.pack("<HBBI", *step) for step in program)


# Bubblewrap: new user, process, network, IPC, host-name and mount namespaces, no capability, and a
# small working directory in memory that vanishes with the run. The read-only root holds programs
# and libraries of /usr and the interpreter's own; directories of installed packages are covered by
# empty ones.

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_PROBE_SECONDS = 10
_ROOTS = ("/bin", "/lib", "/lib32", "/lib64")
_PARTS = ("bin", "sbin", "lib", "lib32", "lib64")
_PACKAGES = ("site-packages", "dist-packages")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_LINKER_CACHE = "/etc/ld.so.cache"


def _interpreter() -> str:
    """Return the interpreter itself, not the link of a virtual environment, which the sandbox does
    not see.
    """
    return str(Path(getattr(sys, "_base_executable", None) or sys.executable).resolve())


def _python(*arguments: str) -> list[str]:
    return [_interpreter(), "-I", "-S", "-B", *arguments]


def _prefixes() -> list[str]:
    """Return the directories that hold the programs and libraries which the interpreter needs."""
    return ["/usr", "/usr/local", str(Path(sys.base_prefix).resolve())]


@cache
def _shown() -> list[str]:
    """Return the directories that the sandbox shows, none of them inside another."""
    found = {str(Path(prefix) / part) for prefix in _prefixes() for part in _PARTS}
    found |= {str(Path(_interpreter()).parent), *_ROOTS}
    real = {path for path in found if Path(path).is_dir() and not Path(path).is_symlink()}
    return sorted(
        path for path in real if not any(str(above) in real for above in Path(path).parents)
    )


@cache
def _hidden() -> list[str]:
    """Return the directories of installed packages among what is shown; the sandbox shows them
    empty.
    """
    found: list[str] = []
    pending = list(_shown())
    while pending:
        with suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    (found if entry.name in _PACKAGES else pending).append(entry.path)
    return sorted(found)


def _bwrap(disk_mib: int, *, server: bool = False) -> list[str]:
    """Return the command line in front of the command, for a size of the working directory in
    MiB.
    """
    line = ["bwrap", "--unshare-all", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    # A fork server makes namespaces for its jobs. It ends when its socket is closed, and not when
    # the thread does that happened to start it.
    line += ["--cap-add", "CAP_SYS_ADMIN"] if server else ["--die-with-parent"]
    line += ["--uid", "65534", "--gid", "65534", "--hostname", "sandbox"]
    for path in _shown():
        line += ["--ro-bind", path, path]
    for path in _ROOTS:
        if Path(path).is_symlink():  # as /lib is often one to usr/lib
            line += ["--symlink", str(Path(path).readlink()), path]
    for path in _hidden():
        line += ["--size", "4096", "--tmpfs", path, "--remount-ro", path]
    for device in _DEVICES:
        line += ["--dev-bind", device, device]
    line += ["--ro-bind-try", _LINKER_CACHE, _LINKER_CACHE]
    # No /proc is mounted: it would show who else is there, and root outside may write in it,
    # however it is mapped here.
    line += ["--dir", "/proc"]
    line += ["--size", str(disk_mib << 20), "--tmpfs", "/work"]
    return [*line, "--remount-ro", "/", "--chdir", "/work", "--"]


@cache
def working() -> bool:
    """Return whether bubblewrap can run a trivial program on this machine; it is tried once."""
    line = [*_bwrap(1), *_python("-c", "print(1)")]
    try:
        done = subprocess.run(
            line, env={"PATH": PATH}, capture_output=True, timeout=_PROBE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and done.stdout == b"1\n"


@cache
def unusable() -> str:
    """Return why no sandbox can be used here, or an empty text where one can be."""
    if platform.machine() not in ARCHITECTURES:
        return f"there is no filter of system calls for {platform.machine()}"
    here = Path(__file__).resolve()
    shown, hidden = (any(map(here.is_relative_to, paths)) for paths in (_shown(), _hidden()))
    if shown and not hidden:
        # A program in the sandbox could read this package, which knows the answers to every task.
        return f"assay lies in {here.parents[3]}, which the sandbox has to show"
    return "" if working() else "bubblewrap does not work here"


def available_backend() -> str | None:
    """Return ``bwrap``, or None where this machine cannot isolate a program."""
    return None if unusable() else "bwrap"


# A fork server is started once for a process, takes jobs from any thread, and ends with the
# process. Where it cannot run, or dies under a job, a sandbox is started for the one job.
_INSIDE = Path(__file__).with_name("inside.py").read_text(encoding="utf-8")
_START_SECONDS = 20
_END_SECONDS = 10
_STATUS_BYTES = 64
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


def _job_text(program: str, limits: Limits, **asked: object) -> bytes:
    """Return a job as JSON; the report has to repeat the nonce, and the rest is what `run`
    takes.
    """
    nothing: dict[str, object] = {"nonce": "", "stdin": "", "calls": [], "files": [], "stub": None}
    code = seccomp_filter(platform.machine()).hex()
    return dumps(nothing | asked | {"program": program, "filter": code} | asdict(limits)).encode()


def _descriptors(
    job: bytes, limits: Limits, ours: ExitStack, theirs: ExitStack
) -> tuple[dict[str, tuple[int, int]], list[int]]:
    """Return descriptor and bound of each pipe to read, by its name, and what the job is given to
    close in ``theirs``.

    A job is given its text, stdout, stderr and the report.
    """
    text = os.memfd_create("job")
    theirs.callback(os.close, text)
    with os.fdopen(text, "wb", closefd=False) as file:
        file.write(job)
    os.lseek(text, 0, os.SEEK_SET)
    readers = {}
    given = [text]
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
    """Read every pipe, given by descriptor and bound, to its end, or until the deadline or an
    overflow.
    """
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
                chunk = os.read(key.fd, _CHUNK)
                if not chunk:
                    selector.unregister(key.fd)
                read += chunk
                overflowed |= len(read) > bound
                del read[bound:]
    return Ended({name: bytes(read) for name, read in output.items()}, timed_out, overflowed)


class Server:
    """A running fork server in a sandbox. It raises OSError if it or its jobs do not start."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._control, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with inside:
            self._process = subprocess.Popen(
                [*_bwrap(1, server=True), *_python("-c", _INSIDE, "serve", str(inside.fileno()))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"PATH": PATH},
                cwd="/",
                pass_fds=(inside.fileno(),),
                start_new_session=True,
            )
        try:
            self._control.settimeout(_START_SECONDS)
            if self._control.recv(16) != b"ready":
                raise OSError("the fork server did not start")
            self._control.settimeout(None)
            limits = Limits(seconds=_START_SECONDS)
            ended = self.perform(_job_text("print(1)", limits), limits)
            if ended.returncode != 0 or ended.output["stdout"] != b"1\n":
                raise OSError("the fork server does not run programs")
        except OSError:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether the server still runs."""
        return self._process.poll() is None

    def perform(self, job: bytes, limits: Limits) -> Ended:
        """Run a job as `_job_text` writes it, or raise an OSError if the server is gone; its socket
        tells its end.
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


_servers: dict[int, Server | None] = {}  # by process
_starting = threading.Lock()


def server() -> Server | None:
    """Return the fork server of this process, or None if none can run; the first call starts it."""
    process = os.getpid()
    with _starting:
        found = _servers.get(process)
        if found is not None and not found.alive:
            found.close()
            del _servers[process]
        if process not in _servers:
            _servers[process] = None
            with suppress(OSError):
                _servers[process] = Server()
        return _servers[process]


@atexit.register
def _close_server() -> None:
    if found := _servers.get(os.getpid()):
        found.close()


def _perform_once(job: bytes, limits: Limits, *, shut_in: bool) -> Ended:
    """Run a job in a sandbox of its own, or in no sandbox."""
    deadline = time.monotonic() + limits.seconds
    with ExitStack() as ours:
        line = _bwrap(limits.disk_mib) if shut_in else []
        environment = {"PATH": PATH}
        directory = "/"
        if not shut_in:  # a sandbox has an environment and a directory of its own
            temporary = tempfile.TemporaryDirectory(
                prefix="assay-sandbox-", ignore_cleanup_errors=True
            )
            environment = {}
            directory = ours.enter_context(temporary)
        with ExitStack() as theirs:
            readers, (text, stdout, stderr, report) = _descriptors(job, limits, ours, theirs)
            process = subprocess.Popen(
                [*line, *_python("-c", _INSIDE, "once", str(report))],
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
            # The leader may be gone while a child of it lives; the group keeps its number until it
            # is empty.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        ended.returncode = None if ended.killed else process.returncode
        return ended


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

    Raises:
        BackendUnavailable: No sandbox can be used here, and ``allow_unsandboxed`` is not set.
        UsageError: Arguments are not JSON.
    """
    limits = limits or Limits()
    shut_in = available_backend() is not None
    if not (shut_in or allow_unsandboxed):
        raise BackendUnavailable(
            unusable(),
            wanted="a sandbox for programs that no one has read",
            do="install bubblewrap where user namespaces are allowed, and keep assay in "
            "site-packages; "
            "allow_unsandboxed (--allow-unsandboxed) accepts the risk",
        )
    backend = "bwrap" if shut_in else "unsandboxed"
    try:
        refused = "ProgramTooLong" if len(program.encode()) > limits.program_bytes else ""
    except UnicodeEncodeError as error:
        refused = type(error).__name__
    if refused:
        nothing = (Outcome("none"),) * len(calls)
        return Result(1, stderr=f"{refused}\n", raised=refused, outcomes=nothing, backend=backend)
    nonce = secrets.token_hex(16)
    questions = [{"target": call.target, "args": call.args} for call in calls]
    for question, call in zip(questions, calls, strict=True):
        if call.equals is not _NOTHING:
            question["equals"] = call.equals
    job = _job_text(
        program, limits, nonce=nonce, stdin=stdin, calls=questions, files=list(files), stub=stub
    )
    started = time.monotonic()
    found = server() if shut_in else None
    ended = None
    if found is not None:
        with suppress(OSError):  # a server that dies under a job does not lose it
            ended = found.perform(job, limits)
    if ended is None:
        ended = _perform_once(job, limits, shut_in=shut_in)
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


def _parse(line: bytes, nonce: str, n_calls: int) -> dict[str, Any]:
    """Return what a report says; a program can write any bytes there, and malformed ones say
    nothing.
    """
    said: dict[str, Any] = {}
    with suppress(DataError, RecursionError, MemoryError):
        said = loads(line, "report of the sandbox")
    if said.get("nonce") != nonce:
        said = {}
    answers = said.get("outcomes")
    raised = said.get("raised")
    files = said.get("files")
    outcomes = (
        [_outcome(answer) for answer in answers[:n_calls]] if isinstance(answers, list) else []
    )
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
    return Outcome(
        answer["kind"], answer.get("value"), name[:_NAME] if isinstance(name, str) else ""
    )
