"""The fork server: one interpreter inside the sandbox that starts a process per job in about a millisecond.

It is passed as text to a bare interpreter, like :mod:`assay.vhack.environment._child`, whose text is its second
argument. Its first is the descriptor of a socket on which every message carries the descriptors of one job: the job,
stdout, stderr, the report, the status, and a lifeline. It never reads a byte that an untrusted program has written.

Per job there are two processes. The *keeper* makes a new process and mount namespace, waits for the program's process,
and writes how it ended to the status; if the lifeline is closed at its other end it kills it. The *runner* is process 1
of that namespace: it mounts a directory in memory of its own, closes every other descriptor, gives up every capability,
and becomes the child. It sees neither the keeper nor another job, and when it ends the kernel ends whatever it left.
"""

import array
import ctypes
import gc
import json
import os
import select
import signal
import socket
import sys
import types
from typing import Any

_NEW_MOUNTS, _NEW_PROCESSES = 0x00020000, 0x20000000
_PRIVATE, _NO_SETUID, _NO_DEVICES = 0x44000, 2, 4  # MS_REC | MS_PRIVATE, MS_NOSUID, MS_NODEV
_DESCRIPTORS = 6
_FILES = 1024  # in the directory of a job: files cost memory even when they are empty
_READY = b"ready"


def main() -> None:
    """Serve jobs until the socket is closed at its other end."""
    control = socket.socket(fileno=int(sys.argv[1]))
    child = types.ModuleType("child")
    exec(compile(sys.argv[2], "_child.py", "exec"), child.__dict__)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers need not be waited for
    # What is there now is never collected, so a collection in a runner does not copy its memory.
    gc.collect()
    gc.freeze()
    control.send(_READY)
    while descriptors := _receive(control):
        if os.fork() == 0:
            control.close()
            _keep(child, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _receive(control: socket.socket) -> list[int]:
    """The descriptors of the next job; none at the end."""
    numbers = array.array("i")
    message, ancillary, _, _ = control.recvmsg(1, socket.CMSG_SPACE(_DESCRIPTORS * numbers.itemsize))
    for _, _, data in ancillary:
        numbers.frombytes(data)
    return numbers.tolist() if message else []


def _keep(child: Any, job: int, out: int, err: int, report: int, status: int, lifeline: int) -> None:
    """Start the runner, wait for it, tell how it ended, and leave."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(_NEW_MOUNTS | _NEW_PROCESSES), "unshare")
    runner = os.fork()
    if runner == 0:
        os.close(status)
        os.close(lifeline)
        try:
            _run(child, libc, job, out, err, report)
        finally:
            os._exit(125)
    for descriptor in (job, out, err, report):
        os.close(descriptor)
    handle = os.pidfd_open(runner)
    waiting = select.poll()
    waiting.register(handle, select.POLLIN)
    waiting.register(lifeline, 0)  # a hang-up is always reported
    if handle not in dict(waiting.poll()):
        os.kill(runner, signal.SIGKILL)
    _, ended = os.waitpid(runner, 0)
    os.write(status, str(os.waitstatus_to_exitcode(ended)).encode())
    os._exit(0)


def _run(child: Any, libc: Any, job: int, out: int, err: int, report: int) -> None:
    with open(job, "rb") as file:
        asked = json.loads(file.read())
    _check(libc.mount(None, b"/", None, _PRIVATE, None), "mount")
    size = f"size={asked['disk_mib'] << 20},nr_inodes={_FILES},mode=777".encode()
    _check(libc.mount(b"none", b"/work", b"tmpfs", _NO_SETUID | _NO_DEVICES, size), "mount")
    os.chdir("/work")
    os.dup2(out, 1)
    os.dup2(err, 2)
    # Descriptor 3 may be that of the report itself, or of what is not needed any more, for 1 and 2 have been copied.
    os.dup2(report, 3)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    _give_up_capabilities(libc)
    child.perform(asked, 3)


def _give_up_capabilities(libc: Any) -> None:
    """All sets become empty, and no_new_privs, which the child sets, keeps them so."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _check(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def _check(result: int, name: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), name)


if __name__ == "__main__":
    main()
