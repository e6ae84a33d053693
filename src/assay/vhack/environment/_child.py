"""What runs inside the sandbox: limits itself for good, runs the program, answers the questions about it.

The parent passes this file as text to a bare interpreter; it imports the standard library only. The job comes as JSON
on stdin, or by way of the fork server (:mod:`assay.vhack.environment._zygote`), and the report goes as one line of JSON
to a descriptor. Program and harness share one process, so a program can say whatever it likes about itself. The parent
therefore never sends what it will compare the answers with.
"""

import ctypes
import json
import os
import platform
import resource
import sys
import traceback
import types
from typing import Any

_OPAQUE_DEPTH = 12
_FILE_CHARACTERS = 4096

# System calls that make processes, watch or change other ones, open sockets, mount, make devices, load code into the
# kernel, set clocks, or leave something behind that outlives the process. A program needs none of them.
_X86_64 = (
    *(41, 53, 56, 57, 58, 59, 322, 435),  # socket, socketpair, clone, fork, vfork, execve, execveat, clone3
    *(101, 310, 311, 312, 424, 434, 438),  # ptrace, process_vm_readv, _writev, kcmp, pidfd_send_signal, _open, _getfd
    *(29, 30, 31, 64, 65, 66, 67, 68, 69, 70, 71, 220, 240, 241),  # System V memory, semaphores, messages; mq
    *(155, 161, 165, 166, 272, 308, 428, 429, 430, 431, 432, 433, 442),  # pivot_root, chroot, mount, unshare, setns, …
    *(133, 259, 303, 304),  # mknod, mknodat, name_to_handle_at, open_by_handle_at
    *(135, 248, 249, 250, 298, 321, 323, 425, 426, 427),  # personality, keys, perf, bpf, userfaultfd, io_uring
    *(103, 163, 167, 168, 169, 170, 171, 172, 173, 175, 176, 179, 246, 313, 320),  # what only an administrator may
    *(159, 164, 227, 305),  # clocks
)
_AARCH64 = (
    *(198, 199, 220, 221, 281, 435),
    *(117, 270, 271, 272, 424, 434, 438),
    *(180, 181, 186, 187, 188, 189, 190, 191, 192, 193, 194, 195, 196, 197),
    *(39, 40, 41, 51, 97, 268, 428, 429, 430, 431, 432, 433, 442),
    *(33, 264, 265),
    *(92, 217, 218, 219, 241, 280, 282, 425, 426, 427),
    *(60, 89, 104, 105, 106, 116, 142, 161, 162, 224, 225, 273, 294),
    *(112, 170, 171, 266),
)
_FORBIDDEN = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}


def main() -> None:
    """Read the job from stdin and perform it; the first argument is the descriptor of the report."""
    perform(json.loads(sys.stdin.buffer.read()), int(sys.argv[1]))


def perform(job: dict[str, Any], report_descriptor: int) -> None:
    """Run the program of a job, report, and leave with its exit code."""
    # A group of its own: a signal to the group it came from would reach what started it, across the namespaces.
    if os.getpgid(0) != os.getpid():
        os.setsid()
    _give_stdin(job["stdin"])
    _limit(job)
    namespace, report, code = _run(job["program"])
    if report["finished"]:
        report["outcomes"] = [_answer(namespace, asked) for asked in job["calls"]]
    report["files"] = {name: text for name in job["files"] if (text := _read(name)) is not None}
    _leave(report_descriptor, {"nonce": job["nonce"], **report}, code)


def _give_stdin(text: str) -> None:
    descriptor = os.memfd_create("stdin")
    os.write(descriptor, text.encode())
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.dup2(descriptor, 0)
    os.close(descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115


def _limit(job: dict[str, Any]) -> None:
    memory, disk, cpu = job["memory_mib"] << 20, job["disk_mib"] << 20, int(job["seconds"]) + 1
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
    if libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
        raise OSError(ctypes.get_errno(), "no_new_privs")
    if platform.machine() in _FORBIDDEN:
        _filter_system_calls(libc, *_FORBIDDEN[platform.machine()])


def _filter_system_calls(libc: ctypes.CDLL, architecture: int, numbers: tuple[int, ...]) -> None:
    """Seccomp: the listed calls fail with EPERM, calls of another architecture kill the process."""

    class Instruction(ctypes.Structure):
        _fields_ = (("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("k", ctypes.c_uint32))

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.POINTER(Instruction)))

    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    # Numbers from 2^30 on are the x32 variants of the same calls.
    program += [(at_least, len(numbers) + 1, 0, 0x40000000)]
    program += [(equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    program += [(give, 0, 0, allow), (give, 0, 0, refuse)]
    code = (Instruction * len(program))(*(Instruction(*line) for line in program))
    if libc.prctl(22, 2, ctypes.byref(Filter(len(program), code)), 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "seccomp")


def _run(program: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    report: dict[str, Any] = {"finished": True, "raised": "", "outcomes": [], "files": {}}
    try:
        exec(compile(program, "program.py", "exec"), module.__dict__)
    except SystemExit as stop:
        return module.__dict__, report, _exit_code(stop.code)
    except BaseException as error:
        report.update(finished=False, raised=type(error).__name__)
        traceback.print_exc(limit=8)
        return module.__dict__, report, 1
    return module.__dict__, report, 0


def _exit_code(code: object) -> int:
    if code is None:
        return 0
    return code & 0xFF if type(code) is int else 1


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
    """The builtin value below ``value``, by the slots of the builtin type: overridden methods have no say."""
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
    if issubclass(kind, dict):
        return {_key(key): _plain(item, depth + 1) for key, item in dict.items(value)}
    raise TypeError


def _key(key: object) -> str:
    if type(key) is not str:
        raise TypeError
    return key


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
