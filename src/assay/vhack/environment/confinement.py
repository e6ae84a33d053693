"""Give up rights for good, by system calls of the running process.

It is part of what runs inside a sandbox, so it needs the standard library only. None of it can be
taken back: a process that calls these functions keeps what is left, and its children do too.
"""

import ctypes
import os
import resource
import signal
import stat
import struct
from collections.abc import Sequence

MINIMUM_LANDLOCK = 3
"""The first version of Landlock that can forbid to truncate files (Linux 6.2)."""

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_MOUNTS = 0x00020000
_NEW_PROCESSES = 0x20000000
_PRIVATE = 0x44000  # MS_REC | MS_PRIVATE
_NO_SETUID = 2
_NO_DEVICES = 4  # MS_NOSUID, MS_NODEV
_CAPABILITIES = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_SET_FILTER = (22, 2)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
_NO_NEW_PRIVILEGES = (38, 1)  # PR_SET_NO_NEW_PRIVS

# The three calls of Landlock have the same numbers on every machine.
_CREATE_RULESET = 444
_ADD_RULE = 445
_RESTRICT_SELF = 446
_VERSION = 1
_BELOW_PATH = 1

# Rights on files: bits 0 to 12 are of the first version, then moving to another directory (2),
# truncating (3) and controlling devices (5).
_WRITE_FILE = 1 << 1
_READ_FILE = 1 << 2
_READ_FOLDER = 1 << 3
_TRUNCATE = 1 << 14
_FILE_RIGHTS = (1 << 15) - 1
_NEWER = (
    (5, 1 << 15),  # controlling devices
    (4, 0b11),  # TCP
    (6, 0b11),  # abstract unix sockets, signals
    (7, 1),  # the audit log of the machine, which is no place for what a program tries
)
"""What newer versions of Landlock restrict too: the first of them that does, and its bits."""

# Regular files, directories and symbolic links may be made and removed; no program may be executed.
_FOLDER = sum(1 << bit for bit in (1, 2, 3, 4, 5, 7, 8, 12, 13, 14))


def _check(result: int, name: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def end_with(parent: int) -> None:
    """Have the kernel kill this process when the thread ends that forked it from ``parent``."""
    _check(_LIBC.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "death signal")
    # 0 where the parent is in an outer process namespace.
    if os.getppid() not in (0, parent):
        os._exit(125)


def enter_namespaces() -> None:
    """Make a mount namespace, and a process namespace for the children."""
    _check(_LIBC.unshare(_NEW_MOUNTS | _NEW_PROCESSES), "unshare")


def mount_folder(path: str, n_bytes: int, n_files: int) -> None:
    """Mount a directory in memory, which no other mount namespace shows."""
    _check(_LIBC.mount(None, b"/", None, _PRIVATE, None), "mount")
    size = f"size={n_bytes},nr_inodes={n_files},mode=777".encode()
    _check(_LIBC.mount(b"none", path.encode(), b"tmpfs", _NO_SETUID | _NO_DEVICES, size), "mount")


def forbid_new_privileges() -> None:
    """Make programs that are executed keep the privileges of this process."""
    _check(_LIBC.prctl(*_NO_NEW_PRIVILEGES, 0, 0, 0), "no_new_privs")


def drop_capabilities() -> None:
    """Empty every set of capabilities."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0)  # of this process
    _check(_LIBC.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def limit_resources(*, memory: int, disk: int, seconds: float) -> None:
    """Bound address space, file size, CPU time, descriptors and processes."""
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, disk),
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 1),
        # 0 would still hand a crash to a core_pattern that is a pipe; the kernel knows 1 as never.
        (resource.RLIMIT_CORE, 1),
    ):
        resource.setrlimit(kind, (value, value))


def filter_system_calls(instructions: bytes) -> None:
    """Install a filter of system calls, given as instructions of classic BPF."""

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    described = Filter(len(instructions) // 8, instructions)
    _check(_LIBC.prctl(*_SET_FILTER, ctypes.byref(described), 0, 0), "seccomp")


def landlock_version() -> int:
    """Return the version of Landlock in this kernel, or 0 for a kernel without it."""
    version: int = _LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)
    return max(0, version)


def restrict_files(readable: Sequence[str], writable: str) -> None:
    """Restrict access to files by Landlock, and TCP, signals and abstract sockets where it can.

    Args:
        readable: Files and directories to read; those that do not exist are left out. Devices may
            be written, too.
        writable: A directory in which files can be made, changed and removed.
    """
    version = landlock_version()
    devices, network, scopes, quiet = (bits if version >= first else 0 for first, bits in _NEWER)
    handled = struct.pack("=QQQ", _FILE_RIGHTS | devices, network, scopes)
    size = ctypes.c_size_t(len(handled))
    ruleset = _check(_LIBC.syscall(_CREATE_RULESET, handled, size, 0), "landlock_create_ruleset")
    _permit(ruleset, writable, _FOLDER)
    for path in readable:
        try:
            mode = os.stat(path).st_mode  # noqa: PTH116
        except FileNotFoundError:
            continue
        permitted = _READ_FILE
        if stat.S_ISDIR(mode):
            permitted |= _READ_FOLDER
        if stat.S_ISCHR(mode):
            permitted |= _WRITE_FILE | _TRUNCATE
        _permit(ruleset, path, permitted)
    _check(_LIBC.syscall(_RESTRICT_SELF, ruleset, quiet), "landlock_restrict_self")
    os.close(ruleset)


def _permit(ruleset: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", rights, descriptor)
    _check(_LIBC.syscall(_ADD_RULE, ruleset, _BELOW_PATH, rule, 0), "landlock_add_rule")
    os.close(descriptor)
