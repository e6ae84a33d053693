"""Commands of the blocks of pages, forked from one process that has imported the heavy packages of
others.

A fresh interpreter imports torch and transformers for seconds, often to work for less than one.
:func:`serve` imports them once, starts no thread and computes nothing, and forks for every command
that :func:`hand_over` sends through a Unix socket: its words, folder, environment, umask and
ignored signals, and its three standard files themselves. The fork runs the program as ``__main__``
and ends as an interpreter does. Signals to the process that waits go on to the fork, and it ends as
the fork ended.

What the run of a reader could show is not left out: no module of assay is imported beforehand, so
each command imports its own in its own order. Where a fork would differ from a fresh interpreter, a
fresh one runs: for an option of ``python`` but ``-c``, another interpreter, further open files, a
terminal, or a variable that differs from those of the server, such as OMP_NUM_THREADS, unless only
shells and assay read it.
"""

import gc
import importlib
import io
import json
import os
import select
import shutil
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

HEAVY = (
    *("torch._dynamo", "torch.distributed.tensor", "transformers.generation.utils", "scipy.stats"),
    *("transformers.models.auto.modeling_auto", "transformers.models.qwen3.modeling_qwen3"),
    *("transformers.models.llama.modeling_llama", "uvicorn", "fastapi", "click"),
)
FREE = ("ASSAY_", "PORT_", "PYTEST_", "KEY", "PWD", "OLDPWD", "SHLVL", "_")
"""Variables that may differ, or how they begin."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def is_forkable(words: list[str], known: dict[str, Any]) -> bool:
    """Return whether a fork of the server does what a fresh interpreter would do."""
    found = Path(shutil.which(words[0]) or "")
    interpreter = Path(known["python"])
    if words[0] == "python":
        first = words[1] if len(words) > 1 else "-"
        same = found.parent == interpreter.parent and (
            first in ("-", "-c") or Path(first).is_file()
        )
    else:
        same = found.read_bytes().startswith(f"#!{interpreter}\n".encode())
    differing = {name for name, _ in os.environ.items() ^ known["variables"].items()}
    opened = {path for path in Path("/proc/self/fd").iterdir() if int(path.name) > 2}
    return (
        same
        and all(name.startswith(FREE) for name in differing)
        and not any(path.exists() for path in opened)  # the listing itself is closed by now
        and not any(os.isatty(number) for number in range(3))
    )


def hand_over(path: str, words: list[str]) -> int:
    """Have the server at a socket run a command, and return how it ended; or become a fresh
    interpreter of it.
    """
    if not is_forkable(words, json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))):
        os.execvp(words[0], words)
    request = {
        "arguments": words[1:] if words[0] == "python" else [shutil.which(words[0]), *words[1:]],
        "folder": str(Path.cwd()),
        "variables": dict(os.environ),
        "umask": os.umask(0),
        "ignored": [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN],
    }
    body = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        for number in SIGNALS:
            signal.signal(number, lambda number, _: server.send(bytes([number])))
        socket.send_fds(server, [len(body).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(body)
        code = int(server.makefile("rb").read())  # nothing, if the server is gone
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def serve(number: int) -> dict[str, Any]:
    """Serve at a listening socket until standard input ends. Return in forks alone: the request of
    each.
    """
    for name in HEAVY:
        importlib.import_module(name)
    if len(list(Path("/proc/self/task").iterdir())) != 1:
        raise SystemExit(
            "a fork has one thread, and this process has more: leave out of HEAVY what started them"
        )
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(fileno=number) as listener:
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                return attend(connection)
            connection.close()
    raise SystemExit


def attend(connection: socket.socket) -> dict[str, Any]:
    """Fork for the request that comes next, tell its sender how the fork ended, and end. Return in
    the fork alone.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, files, _, _ = socket.recv_fds(connection, 8, 3)
    request: dict[str, Any] = json.loads(
        connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
    )
    child = os.fork()
    if child == 0:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        return request
    for file in files:
        os.close(file)
    ended = os.pidfd_open(child)
    while ended not in select.select([connection, ended], [], [])[0]:
        told = connection.recv(1)
        os.kill(child, told[0] if told else signal.SIGKILL)  # who waited is gone
    with suppress(OSError):
        connection.sendall(b"%d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(0)


def prepare(request: dict[str, Any], before: dict[str, str]) -> tuple[CodeType, ModuleType]:
    """Make this process what a fresh interpreter would be, and return the program and the module
    that it runs in.
    """
    os.chdir(request["folder"])
    os.umask(request["umask"])
    variables = request["variables"]
    for name in before.keys() - variables.keys():
        os.environ.pop(name, None)
    os.environ.update(
        dict(variables.items() - before.items())
    )  # what packages set when imported stays
    for number in SIGNALS:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else usual)
    at_once = bool(variables.get("PYTHONUNBUFFERED"))
    for number, name in (
        (1, "stdout"),
        (2, "stderr"),
    ):  # those of the server remember what kind of file they had
        old = getattr(sys, name)
        new = io.TextIOWrapper(
            open(number, "wb", buffering=0 if at_once else -1, closefd=False),  # noqa: SIM115  # as long as the process
            encoding=old.encoding,
            errors=old.errors,
            line_buffering=not at_once and (number == 2 or os.isatty(number)),
            write_through=at_once,
        )
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    sys.modules["numpy"].random.seed()  # Python does so for its own numbers
    main = sys.modules["__main__"] = ModuleType("__main__")
    sys.argv = request["arguments"] or [""]
    sys.path[0] = ""
    match sys.argv[0]:
        case "-c":
            source = sys.argv.pop(1).encode()
            name = "<string>"
        case "" | "-":
            source = sys.stdin.buffer.read()
            name = "<stdin>"
            main.__file__ = name
        case file:
            sys.path[0] = str(Path(file).resolve().parent)
            source = Path(file).read_bytes()
            name = str(Path(file).absolute())
            main.__file__ = name
    return compile(source, name, "exec", dont_inherit=True), main


if __name__ == "__main__":
    BEFORE = dict(os.environ)
    if sys.argv[1] != "serve":
        sys.exit(hand_over(sys.argv[1], sys.argv[2:]))
    PROGRAM, MAIN = prepare(serve(int(sys.argv[2])), BEFORE)
    exec(PROGRAM, MAIN.__dict__)
