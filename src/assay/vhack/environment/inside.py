"""The program inside the sandbox: a fork server.

The parent passes this file as text to a bare interpreter; it imports the standard library and three
more files that are passed with it. A job is JSON, and its report is one line of JSON on a
descriptor of its own. Program and harness share one process, so a program can say whatever it likes
about itself, and can look at the job. The parent therefore never sends what it will compare the
answers with.

The fork server starts a process for a job in about a millisecond. It never reads a byte that an
untrusted program has written. Per job there are two processes. The *keeper* waits for the program's
process, and writes how it ended to a socket, the status; if that is shut at its other end, or the
server ends, the keeper kills it. The *runner* closes every other descriptor, gives up every
capability, and performs the job. With bubblewrap the keeper makes a new process and mount
namespace, and the runner mounts a directory in memory. With Landlock the runner can reach a
directory that the keeper measures and empties; so it is in a bubblewrap for one job, which may not
be able to make namespaces. A runner starts no process, and ends with its
keeper.
"""

import ast
import builtins
import gc
import io
import json
import math
import os
import select
import signal
import socket
import sys
import traceback
import types
from contextlib import suppress
from itertools import islice
from typing import Any

# The parent has made modules of these in the bare interpreter, where their packages are absent.
from assay.vhack.environment.confinement import (
    drop_capabilities,
    end_with,
    enter_namespaces,
    filter_system_calls,
    forbid_new_privileges,
    limit_resources,
    mount_folder,
    restrict_files,
)
from assay.vhack.environment.one_thread import use_one_thread
from assay.vhack.environment.scratch import (
    FILE_CHARACTERS,
    FILES,
    make_folder,
    overflows,
    remove_folder,
)

_OPAQUE_DEPTH = 100
_DESCRIPTORS = 5
_MESSAGE = 16
_MEASURE_MILLISECONDS = 5
# Bits of the longest number that Python writes as text by default.
_MOST_BITS = 14_000
_MOST_ITEMS = 1 << 16  # of a generator, which may have no end
_PROGRAM = "program.py"
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_STREAMS = (("stdin", "r", -1), ("stdout", "w", -1), ("stderr", "w", 1))
_BLOCKS = (ast.stmt, ast.excepthandler, ast.match_case)


def _serve(setup: dict[str, Any], control: socket.socket, parent: int) -> None:
    """Serve jobs until the socket is closed at its other end, or the parent, a pidfd, ends.

    Every message has the room for files in MiB, and carries the descriptors of one job: the job,
    stdout, stderr, the report and the status.
    """
    # Keepers need not be waited for.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    if setup["backend"] == "landlock":
        # Programs cannot list the directories of the standard library: the names are looked up now.
        sys.meta_path[-1].find_spec("absent", None)
        forbid_new_privileges()
        restrict_files(setup["readable"], setup["root"])
    # What is there now is never collected, so a collection in a runner does not copy its memory.
    gc.collect()
    gc.freeze()
    # Keepers see by its other end that the server has ended.
    server_end, held_open = os.pipe()
    control.send(b"ready")
    waiting = select.poll()
    waiting.register(control, select.POLLIN)
    waiting.register(parent, select.POLLIN)
    while parent not in dict(waiting.poll()):
        message, descriptors, _, _ = socket.recv_fds(control, _MESSAGE, _DESCRIPTORS)
        if not descriptors:
            break
        if os.fork() == 0:
            control.close()
            os.close(held_open)
            _keep(setup, server_end, int(message) << 20, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
    os.close(held_open)
    with suppress(OSError):
        # Fails when all keepers have ended.
        os.waitpid(-1, 0)
    with suppress(OSError):
        os.rmdir(setup["root"])  # noqa: PTH106


def _keep(
    setup: dict[str, Any],
    server_end: int,
    room: int,
    job: int,
    out: int,
    err: int,
    report: int,
    status: int,
) -> None:
    """Start the runner, wait for it, tell how it ended, and leave."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    in_memory = setup["backend"] == "bwrap"
    folder = "/work"
    if in_memory:
        enter_namespaces()
    else:
        folder = make_folder(setup["root"])
    keeper = os.getpid()
    runner = os.fork()
    if runner == 0:
        try:
            end_with(keeper)
            if in_memory:
                mount_folder(folder, room, FILES)
            os.chdir(folder)
            _be_runner(setup, folder, job, out, err, report)
        finally:
            os._exit(125)
    for descriptor in (job, out, err, report):
        os.close(descriptor)
    handle = os.pidfd_open(runner)
    waiting = select.poll()
    # There is nothing to read but the end.
    for descriptor in (handle, status, server_end):
        waiting.register(descriptor, select.POLLIN)
    pause = None if in_memory else _MEASURE_MILLISECONDS
    full = False
    while not (ends := dict(waiting.poll(pause))) and not full:
        full = overflows(folder, runner, room)
    if handle not in ends:
        os.kill(runner, signal.SIGKILL)
    _, ended = os.waitpid(runner, 0)
    if not in_memory:
        remove_folder(folder)
    os.write(status, b"full" if full else str(os.waitstatus_to_exitcode(ended)).encode())
    os._exit(0)


def _be_runner(
    setup: dict[str, Any], folder: str, job: int, out: int, err: int, report: int
) -> None:
    with open(job, "rb") as file:
        description = json.loads(file.read())
    os.dup2(out, 1)
    os.dup2(err, 2)
    # Descriptor 3 may be that of the report itself, or of what is not needed any more, for 1 and 2
    # have been copied.
    os.dup2(report, 3)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    if setup["backend"] == "landlock":
        # What the server shows besides is the directories of other jobs.
        restrict_files(setup["folders"], folder)
    drop_capabilities()
    _perform(description, 3)


def _perform(job: dict[str, Any], report_descriptor: int) -> None:
    """Run the program of a job, report, and leave with its exit code."""
    # A group of its own: a signal to the group it came from would reach what started it, across the
    # namespaces.
    os.setsid()
    descriptor = os.memfd_create("stdin")
    os.write(descriptor, job["stdin"].encode())
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.dup2(descriptor, 0)
    os.close(descriptor)
    # Those of the server were made for other descriptors, which could seek.
    for number, (name, mode, size) in enumerate(_STREAMS):
        stream = open(number, mode, size, "utf-8", "backslashreplace", closefd=False)  # noqa: SIM115
        vars(sys).update({name: stream, f"__{name}__": stream})
    forbid_new_privileges()
    limit_resources(
        memory=job["memory_mib"] << 20, disk=job["disk_mib"] << 20, seconds=job["seconds"]
    )
    use_one_thread(job["program"])
    filter_system_calls(bytes.fromhex(job["filter"]))
    namespace, report, code = _run(job)
    if report["finished"]:
        report["outcomes"] = [_answer(namespace, question) for question in job["calls"]]
    # What Python writes when it ends: files that were left open, and a stdout that was replaced.
    for stream in [item for item in gc.get_objects() if type(item) is io.TextIOWrapper]:
        with suppress(Exception):
            stream.flush()
    report["files"] = {name: text for name in job["files"] if (text := _read(name)) is not None}
    _leave(report_descriptor, {"nonce": job["nonce"], **report}, code)


def _run(job: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], int]:
    module = types.ModuleType("__main__")
    module.__file__ = _PROGRAM
    sys.modules["__main__"] = module
    sys.argv = [_PROGRAM]
    # Python's site adds them, which is not imported here.
    vars(builtins).update(exit=sys.exit, quit=sys.exit)
    report: dict[str, Any] = {"finished": True, "raised": "", "outcomes": [], "files": {}}
    code = 0
    try:
        exec(_compiled(job["program"], job["stub"]), module.__dict__)
    except SystemExit as stop:
        code = int(stop.code is not None)
        if isinstance(stop.code, int):
            code = int.__and__(stop.code, 0xFF)
    except BaseException as error:
        # What a grader imports does not run such a block: it may read input that is not there.
        is_finished = isinstance(error, Exception) and _in_main_block(job["program"], error)
        report.update(finished=is_finished, raised=type(error).__name__)
        traceback.print_exc(limit=8)
        code = 1
    return module.__dict__, report, code


def _compiled(program: str, stub: list[Any] | None) -> types.CodeType:
    """Compile the program; with a stub ``[name, value]`` every function of that name returns the
    value, and what is assigned to the name is such a function.

    Docstrings stay, for they may be tests.
    """
    if stub is None:
        return compile(program, _PROGRAM, "exec")
    tree = ast.parse(program)
    name = stub[0].rpartition(".")[2]
    value = ast.parse(repr(stub[1]), mode="eval").body
    for node in ast.walk(tree):
        if isinstance(node, _FUNCTIONS) and node.name == name:
            docstring = node.body[:1] if ast.get_docstring(node, clean=False) is not None else []
            node.body = [*docstring, ast.Return(value)]
    function = ast.parse(f"{name} = lambda *_, **__: {stub[1]!r}").body[0]
    blocks: list[ast.AST] = [tree]
    while blocks:
        block = blocks.pop()
        blocks += [*getattr(block, "handlers", ()), *getattr(block, "cases", ())]
        # Such as the function that ``for solve in …`` binds for its block.
        begin = [function] if _assigns(block, name) else []
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(block, field, ())
            blocks += [node for node in statements if not isinstance(node, _FUNCTIONS)]
            if statements:
                following = [[function] if _assigns(node, name) else [] for node in statements]
                pairs = zip(statements, following, strict=True)
                more = [node for first, others in pairs for node in (first, *others)]
                setattr(block, field, [*begin, *more])
    return compile(ast.fix_missing_locations(tree), _PROGRAM, "exec")


def _assigns(node: ast.AST, name: str) -> bool:
    """Return whether a statement gives a name a new value, which is not made of the old one.

    Of a compound statement it is what stands before its blocks.
    """
    if isinstance(node, ast.AugAssign) or getattr(node, "value", node) is None:
        return False
    parts = [node]
    for part in parts:
        children = ast.iter_child_nodes(part)
        parts += [child for child in children if not isinstance(child, _BLOCKS)]
    names = [(part.id, type(part.ctx)) for part in parts if isinstance(part, ast.Name)]
    imported = [part.asname or part.name for part in parts if isinstance(part, ast.alias)]
    matched = [part.name for part in parts if isinstance(part, ast.MatchAs | ast.MatchStar)]
    is_bound = (name, ast.Store) in names or name in (*imported, *matched)
    # ``solve.valid = True`` names it too, and reads it.
    return (name, ast.Load) not in names and is_bound


def _in_main_block(program: str, error: Exception) -> bool:
    """Return whether an exception left what ``__name__ == "__main__"`` is the condition of."""
    frame = error.__traceback__.tb_next if error.__traceback__ is not None else None
    if frame is None or frame.tb_frame.f_code.co_filename != _PROGRAM:  # it does not compile
        return False
    with suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        return any(
            node.lineno <= frame.tb_lineno <= (node.end_lineno or 0)
            and "__name__" in ast.unparse(node).split("\n", 1)[0]
            for node in ast.walk(ast.parse(program))
            if isinstance(node, ast.If | ast.IfExp | ast.BoolOp)
        )
    return False


def _answer(namespace: dict[str, Any], question: dict[str, Any]) -> dict[str, Any]:
    try:
        answer = _resolve(namespace, question["target"])
        if question["args"] is not None:
            answer = _settled(answer(*question["args"]))
        if "equals" in question:
            answer = bool(answer == question["equals"])
    except BaseException as error:
        return {"kind": "error", "name": type(error).__name__}
    try:
        return {"kind": "value", "value": _plain(answer, 0)}
    except Exception:
        return {"kind": "opaque", "name": type(answer).__name__}


def _settled(answer: Any) -> Any:
    """Return what a coroutine returns, and the items of a generator; anything else as it is."""
    if type(answer) is types.CoroutineType:
        return sys.modules["asyncio"].run(answer)  # which a program that names async has
    is_generator = type(answer) is types.GeneratorType
    return list(islice(answer, _MOST_ITEMS)) if is_generator else answer


def _resolve(namespace: dict[str, Any], target: str) -> Any:
    first, *attributes = target.split(".")
    owners = [
        owner
        for owner in namespace.values()
        if isinstance(owner, type) and first in type.__getattribute__(owner, "__dict__")
    ]
    # ``solve`` may be a method, as in ``class Solution:``; bases and helpers come before it.
    value = getattr(owners[-1](), first) if owners and first not in namespace else namespace[first]
    if attributes and type(value) is type and not hasattr(type(value), attributes[0]):
        value = value()
    for name in attributes:
        value = getattr(value, name)
    return value


def _plain(value: Any, depth: int) -> Any:
    """Return the builtin value below ``value``, by the slots of the builtin type: overridden
    methods have no say.

    Keys that are no text become it, as in JSON.
    """
    kind = type(value)
    if value is None or kind is bool:
        return value
    if depth > _OPAQUE_DEPTH:
        raise ValueError
    if issubclass(kind, int) and int.bit_length(value) <= _MOST_BITS:
        return int.__int__(value)
    if issubclass(kind, float) and math.isfinite(float.__float__(value)):
        return float.__float__(value)
    if issubclass(kind, str):
        return str.encode(value).decode()  # half a character of UTF-16 is refused
    if issubclass(kind, list | tuple):
        items = list.__iter__(value) if issubclass(kind, list) else tuple.__iter__(value)
        return [_plain(item, depth + 1) for item in items]
    if issubclass(kind, dict):
        keys = [_plain(key, _OPAQUE_DEPTH) for key in dict.__iter__(value)]
        fields = {
            key if type(key) is str else json.dumps(key): _plain(item, depth + 1)
            for key, item in zip(keys, dict.values(value), strict=True)
        }
        if len(fields) == len(keys):  # 1 and "1" would be one key
            return fields
    raise TypeError


def _read(name: str) -> str | None:
    try:
        with open(name, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            return file.read(FILE_CHARACTERS)
    except OSError:
        return None


def _leave(descriptor: int, report: dict[str, Any], code: int) -> None:
    try:
        line = json.dumps(report, allow_nan=False)
    except ValueError:
        report["outcomes"] = [{"kind": "opaque", "name": "not JSON"} for _ in report["outcomes"]]
        line = json.dumps(report)
    unsent = line.encode()
    while unsent:
        unsent = unsent[os.write(descriptor, unsent) :]
    os._exit(code)


if __name__ == "__main__":
    # Descriptors: of the socket, and of a pidfd of the parent.
    _serve(
        json.loads(sys.stdin.buffer.read()),
        socket.socket(fileno=int(sys.argv[1])),
        int(sys.argv[2]),
    )
