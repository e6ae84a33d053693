"""What runs inside the sandbox: ``once`` for a job on stdin, or ``serve`` as the fork server of
many jobs.

The parent passes this file as text to a bare interpreter; it imports the standard library only. A
job is JSON, and its report is one line of JSON on a descriptor of its own. Program and harness
share one process, so a program can say whatever it likes about itself. The parent therefore never
sends what it will compare the answers with.

The fork server starts a process for a job in about a millisecond. It never reads a byte that an
untrusted program has written. Per job there are two processes. The *keeper* makes a new process and
mount namespace, waits for the program's process, and writes how it ended to a socket, the status;
if that is shut at its other end, the keeper kills it. The *runner* is process 1 of that namespace:
it mounts a directory in memory of its own, closes every other descriptor, gives up every
capability, and performs the job. It sees neither the keeper nor another job, and when it ends the
kernel ends whatever it left.
"""

import ast
import ctypes
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import traceback
import types
from typing import Any

_OPAQUE_DEPTH = 12
_FILE_CHARACTERS = 4096

_NEW_MOUNTS = 0x00020000
_NEW_PROCESSES = 0x20000000
_PRIVATE = 0x44000
_NO_SETUID = 2
_NO_DEVICES = 4  # MS_REC | MS_PRIVATE, MS_NOSUID, MS_NODEV
_DESCRIPTORS = 5
_FILES = 1024  # in the directory of a job: files cost memory even when they are empty


def main() -> None:
    """Serve jobs on the socket, or perform one that reports to the pipe, whose descriptor is the
    second argument.
    """
    if sys.argv[1] == "serve":
        _serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        _perform(json.loads(sys.stdin.buffer.read()), int(sys.argv[2]))


def _serve(control: socket.socket) -> None:
    """Serve jobs until the socket is closed at its other end.

    Every message carries the descriptors of one job: the job, stdout, stderr, the report and the
    status.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers need not be waited for
    # What is there now is never collected, so a collection in a runner does not copy its memory.
    gc.collect()
    gc.freeze()
    control.send(b"ready")
    while descriptors := socket.recv_fds(control, 1, _DESCRIPTORS)[1]:
        if os.fork() == 0:
            control.close()
            _keep(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _keep(job: int, out: int, err: int, report: int, status: int) -> None:
    """Start the runner, wait for it, tell how it ended, and leave."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(_NEW_MOUNTS | _NEW_PROCESSES), "unshare")
    runner = os.fork()
    if runner == 0:
        os.close(status)
        try:
            _be_runner(libc, job, out, err, report)
        finally:
            os._exit(125)
    for descriptor in (job, out, err, report):
        os.close(descriptor)
    handle = os.pidfd_open(runner)
    waiting = select.poll()
    waiting.register(handle, select.POLLIN)
    waiting.register(status, select.POLLIN)  # there is nothing to read but the end
    if handle not in dict(waiting.poll()):
        os.kill(runner, signal.SIGKILL)
    _, ended = os.waitpid(runner, 0)
    os.write(status, str(os.waitstatus_to_exitcode(ended)).encode())
    os._exit(0)


def _be_runner(libc: ctypes.CDLL, job: int, out: int, err: int, report: int) -> None:
    with open(job, "rb") as file:
        asked = json.loads(file.read())
    _check(libc.mount(None, b"/", None, _PRIVATE, None), "mount")
    size = f"size={asked['disk_mib'] << 20},nr_inodes={_FILES},mode=777".encode()
    _check(libc.mount(b"none", b"/work", b"tmpfs", _NO_SETUID | _NO_DEVICES, size), "mount")
    os.chdir("/work")
    os.dup2(out, 1)
    os.dup2(err, 2)
    # Descriptor 3 may be that of the report itself, or of what is not needed any more, for 1 and 2
    # have been copied.
    os.dup2(report, 3)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    # All sets of capabilities become empty, and no_new_privs, which `_limit` sets, keeps them so.
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _check(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    _perform(asked, 3)


def _check(result: int, name: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), name)


def _perform(job: dict[str, Any], report_descriptor: int) -> None:
    """Run the program of a job, report, and leave with its exit code."""
    # A group of its own: a signal to the group it came from would reach what started it, across the
    # namespaces.
    if os.getpgid(0) != os.getpid():
        os.setsid()
    descriptor = os.memfd_create("stdin")
    os.write(descriptor, job["stdin"].encode())
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.dup2(descriptor, 0)
    os.close(descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    _limit(job)
    namespace, report, code = _run(job)
    if report["finished"]:
        report["outcomes"] = [_answer(namespace, asked) for asked in job["calls"]]
    report["files"] = {name: text for name in job["files"] if (text := _read(name)) is not None}
    _leave(report_descriptor, {"nonce": job["nonce"], **report}, code)


def _limit(job: dict[str, Any]) -> None:
    memory = job["memory_mib"] << 20
    disk = job["disk_mib"] << 20
    cpu = int(job["seconds"]) + 1
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, disk),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 1),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.prctl(38, 1, 0, 0, 0), "no_new_privs")  # PR_SET_NO_NEW_PRIVS
    instructions = bytes.fromhex(job["filter"])

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    given = Filter(len(instructions) // 8, instructions)
    _check(
        libc.prctl(22, 2, ctypes.byref(given), 0, 0), "seccomp"
    )  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _run(job: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], int]:
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    report: dict[str, Any] = {"finished": True, "raised": "", "outcomes": [], "files": {}}
    code = 0
    try:
        exec(_compiled(job["program"], job["stub"]), module.__dict__)
    except SystemExit as stop:
        code = 0 if stop.code is None else stop.code & 0xFF if type(stop.code) is int else 1
    except BaseException as error:
        report.update(finished=False, raised=type(error).__name__)
        traceback.print_exc(limit=8)
        code = 1
    return module.__dict__, report, code


def _compiled(program: str, stub: list[Any] | None) -> types.CodeType:
    """Compile the program; a stub ``[name, value]`` first gives every function ``name`` the body
    ``return value``.
    """
    if stub is None:
        return compile(program, "program.py", "exec")
    tree = ast.parse(program)
    name, value = stub
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            node.body = [ast.Return(ast.parse(repr(value), mode="eval").body)]
    return compile(ast.fix_missing_locations(tree), "program.py", "exec")


def _answer(namespace: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    try:
        found = _resolve(namespace, asked["target"])
        if asked["args"] is not None:
            found = found(*asked["args"])
        if "equals" in asked:
            found = bool(found == asked["equals"])
    except BaseException as error:
        return {"kind": "error", "name": type(error).__name__}
    try:
        return {"kind": "value", "value": _plain(found, 0)}
    except Exception:
        return {"kind": "opaque", "name": type(found).__name__}


def _resolve(namespace: dict[str, Any], target: str) -> Any:
    first, *rest = target.split(".")
    found = namespace[first]
    if rest and type(found) is type and not hasattr(type(found), rest[0]):
        found = found()
    for name in rest:
        found = getattr(found, name)
    return found


def _plain(value: Any, depth: int) -> Any:
    """Return the builtin value below ``value``, by the slots of the builtin type: overridden
    methods have no say.
    """
    kind = type(value)
    if value is None or kind is bool:
        return value
    if depth > _OPAQUE_DEPTH:
        raise ValueError
    if issubclass(kind, int):
        return int.__int__(value)
    if issubclass(kind, float):
        return float.__float__(value)
    if issubclass(kind, str):
        return str.__str__(value)
    if issubclass(kind, list | tuple):
        items = list.__iter__(value) if issubclass(kind, list) else tuple.__iter__(value)
        return [_plain(item, depth + 1) for item in items]
    if issubclass(kind, dict) and all(type(key) is str for key in dict.__iter__(value)):
        return {key: _plain(item, depth + 1) for key, item in dict.items(value)}
    raise TypeError


def _read(name: str) -> str | None:
    try:
        with open(name, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            return file.read(_FILE_CHARACTERS)
    except OSError:
        return None


def _leave(descriptor: int, report: dict[str, Any], code: int) -> None:
    try:
        line = json.dumps(report, allow_nan=False)
    except ValueError:
        report["outcomes"] = [{"kind": "opaque", "name": "not JSON"} for _ in report["outcomes"]]
        line = json.dumps(report)
    rest = line.encode()
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
