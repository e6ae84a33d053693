"""The process that renders chat templates (:mod:`assay.models.templates`), with its bounds."""

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from assay.errors import ResourceError, UsageError

LONGEST_TEXT = 2**24
"""Characters of a prompt, of messages with their tools, and of what a template makes of them."""

CPU_SECONDS = 2
"""CPU time that one text may take: in time of the wall, a busy machine would refuse texts."""

MEMORY_BYTES = 2**29
"""Bytes of address space that the process may take."""

_PATIENCE = 60
"""Seconds of the wall after which something else is wrong."""


class TemplateProcess:
    """The process that renders: started at the first request, ended with this one or by a fault.

    Attributes:
        process: The running process, or None.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, name: str, request: bytes) -> bytes:
        """Return the answer to a request: ``+`` and a text, or ``-`` and a reason.

        Raises:
            UsageError: The template called ``name`` takes more time or memory than it may.
            ResourceError: The process does not start.
        """
        with self._lock:
            try:
                if self.process is None or self.process.poll() is not None:
                    self._start()
                self.connection.send_bytes(request)
                if not self.connection.poll(_PATIENCE):
                    raise TimeoutError
                return self.connection.recv_bytes(4 * LONGEST_TEXT + 1)
            except (EOFError, OSError) as error:
                is_late = self.end() == -signal.SIGPROF or isinstance(error, TimeoutError)
            except BaseException:  # else its answer would be taken for that to the next request
                self.end()
                raise
        bound = f"{MEMORY_BYTES >> 20} MiB, or ends the process that renders"
        if is_late:
            bound = f"{CPU_SECONDS} s"
        raise UsageError(
            f"{name}, which takes more for these messages than {bound}",
            wanted="a template that writes messages one after another",
            do="take the template of a publisher whom you trust, or write the prompt as text",
        )

    def _start(self) -> None:
        self.connection, remote = multiprocessing.Pipe()
        program = str(Path(__file__).with_name("templates.py"))
        bounds = map(str, (remote.fileno(), CPU_SECONDS, MEMORY_BYTES, LONGEST_TEXT))
        try:
            with remote:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-S", program, *bounds],
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(remote.fileno(),),
                    start_new_session=True,
                )
            self.connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise ResourceError(
                f"no process that renders chat templates: {type(error).__name__} {error}, ended "
                f"with {self.end()}",
                wanted="Python with jinja2",
                do="install assay again",
            ) from None

    def end(self) -> int | None:
        """End the process and return its exit status; None where none runs."""
        if self.process is None:
            return None
        self.connection.close()
        self.process.kill()
        status = self.process.wait()
        self.process = None
        return status

    def forget(self) -> None:
        """Leave the process to the parent that this process was forked from."""
        if self.process is not None:
            self.process.returncode = 0  # it is not waited for here
        self.__init__()  # type: ignore[misc]


TEMPLATE_PROCESS = TemplateProcess()
atexit.register(TEMPLATE_PROCESS.end)
os.register_at_fork(after_in_child=TEMPLATE_PROCESS.forget)
