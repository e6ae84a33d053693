"""Work for several threads in a process that may start none: done at once, or refused by name.

It is part of what runs inside a sandbox, so it needs the standard library only.
"""

import _thread
import io
import os
import selectors
import threading
from collections.abc import Callable
from typing import Any, NoReturn

_STARTERS = (
    (_thread, "start_new_thread"),
    (_thread, "start_new"),
    (_thread, "start_joinable_thread"),
    (threading, "_start_new_thread"),
    (threading, "_start_joinable_thread"),
)
"""Where Python 3.11 to 3.14 start threads."""


class ThreadsForbidden(RuntimeError):
    """A program starts a thread."""


def _refuse(*_: object, **__: object) -> NoReturn:
    raise ThreadsForbidden("the sandbox starts no threads; executors and asyncio run in one")


class _PipeEnd(io.FileIO):
    """One end of a pipe with the methods of a socket that an event loop calls."""

    recv = io.FileIO.read
    send = io.FileIO.write


def use_one_thread(program: str) -> None:
    """Refuse threads by name, and let executors and event loops that a program names do without.

    An executor of threads does its work when it is submitted. An event loop waits by `poll`, and
    wakes up by a pipe in place of a pair of sockets.
    """
    for module, name in _STARTERS:
        if hasattr(module, name):
            setattr(module, name, _refuse)
    if "concurrent" in program or "async" in program:
        from concurrent.futures import thread

        thread.ThreadPoolExecutor.submit = _submit  # type: ignore[method-assign]
    if "async" in program:  # whose result is waited for
        from asyncio import selector_events

        selectors.DefaultSelector = selectors.PollSelector  # type: ignore[misc,assignment]
        loop: Any = selector_events.BaseSelectorEventLoop
        loop._make_self_pipe = _make_self_pipe
        loop.shutdown_default_executor = _shut_executor


def _submit(self: Any, function: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
    from concurrent.futures import Future

    if self._shutdown:
        raise RuntimeError("cannot schedule new futures after shutdown")
    # The one thread is begun once; Python 3.14 keeps it elsewhere.
    if begin := getattr(self, "_initializer", None):
        self._initializer = None
        begin(*self._initargs)
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    try:
        result = function(*args, **options)
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
    return future


def _make_self_pipe(self: Any) -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    self._ssock = _PipeEnd(reader)
    self._csock = _PipeEnd(writer, "w")
    self._internal_fds += 1
    self._add_reader(reader, self._read_from_self)


async def _shut_executor(self: Any, timeout: float | None = None) -> None:
    self._executor_shutdown_called = True
    if self._default_executor is not None:
        self._default_executor.shutdown()
