"""The ways to shut a process in: bubblewrap, or the same namespaces set up by util-linux.

Both give a new user, process, network, IPC, host-name and mount namespace, no capability, a small working directory in
memory that vanishes with the run, and a read-only root. The root holds programs and libraries of ``/usr`` and the
interpreter's own, each directory of installed packages (``site-packages``, ``dist-packages``) covered by an empty one,
and three devices.
"""

import csv
import os
import platform
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from assay.errors import BackendUnavailable

# --------------------------------------------------------------------------------------------------
# The system calls that a program in the sandbox may make, and the seccomp filter that holds it to them.
#
# The table ``system_calls.csv`` is an allow list: whatever it does not name fails with EPERM. It holds what CPython and
# its standard library need for one process that computes and keeps files in its own directory. It therefore leaves out
# making processes and threads, sockets, signals (kill and its relatives), file locks, inotify, sync, mounts and listing
# them, shared memory, queues, keys, setting clocks, and everything that only an administrator may do.

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The machines that the table has numbers for, with the constant by which the kernel names each to a filter."""

with Path(__file__).with_name("system_calls.csv").open(encoding="utf-8") as _file:
    _ROWS = list(csv.DictReader(_file))
ALLOWED = {machine: {row["name"]: int(row[machine]) for row in _ROWS if row[machine]} for machine in ARCHITECTURES}
"""The number of every permitted system call by machine and name; the table has no number where a machine lacks it."""

RESTRICTED: dict[str, tuple[int, tuple[int, ...]]] = {
    "fcntl": (1, (0, 1, 2, 3, 4, 1030)),  # duplicate, flags; not locks, leases, notification or the size of pipes
    # Whether it is a terminal, its size, flags, and how many bytes wait.
    "ioctl": (1, (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
    "futex": (1, (128, 129, 137, 138, 393)),  # private ones only: others meet in files that two jobs can map
    "madvise": (2, (0, 1, 2, 3, 4, 8, 14, 15)),  # not those that push pages of shared files out of memory
    "prlimit64": (0, (0,)),  # its own limits, which it cannot raise
}
"""Calls that are permitted for some values of one argument: the position of the argument, and the values."""

_NEWEST = 452
_X32 = 0x40000000  # numbers from here on are the x32 variants of the calls of x86_64
_LOAD, _EQUAL, _ABOVE, _AT_LEAST, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x06
_ALLOW, _EPERM, _ENOSYS, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in the kernel's struct seccomp_data


@cache
def seccomp_filter(machine: str) -> bytes:
    """Return the filter for a name in ``ARCHITECTURES`` as the kernel takes it: instructions of classic BPF.

    A call from another architecture kills the process. Calls newer than the table fail with ENOSYS, so that a newer C
    library falls back to an older call; all others that are not permitted fail with EPERM. Every instruction has eight
    bytes: code (u16), jump if true (u8), jump if false (u8) and operand (u32), little-endian.
    """
    if machine not in ARCHITECTURES:
        raise BackendUnavailable(
            f"no filter of system calls for {machine}",
            wanted=" or ".join(ARCHITECTURES),
            do="run it on such a machine",
        )
    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _EPERM)
    program = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, ARCHITECTURES[machine]), (_RETURN, 0, 0, _KILL)]
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


PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_PROBE_SECONDS = 10
_ROOTS = ("/bin", "/lib", "/lib32", "/lib64")
_PARTS = ("bin", "sbin", "lib", "lib32", "lib64")
_PACKAGES = ("site-packages", "dist-packages")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_LINKER_CACHE = "/etc/ld.so.cache"


def _interpreter() -> str:
    """Return the interpreter itself, not the link of a virtual environment, which the sandbox does not see."""
    return str(Path(getattr(sys, "_base_executable", None) or sys.executable).resolve())


def _prefixes() -> list[str]:
    """Return the directories that hold the programs and libraries which the interpreter needs."""
    return ["/usr", "/usr/local", str(Path(sys.base_prefix).resolve())]


@cache
def _shown() -> list[str]:
    """Return the directories that the sandbox shows, none of them inside another."""
    found = {str(Path(prefix) / part) for prefix in _prefixes() for part in _PARTS}
    found |= {str(Path(_interpreter()).parent), *_ROOTS}
    real = {path for path in found if Path(path).is_dir() and not Path(path).is_symlink()}
    return sorted(path for path in real if not any(str(above) in real for above in Path(path).parents))


@cache
def _hidden() -> list[str]:
    """Return the directories of installed packages among what is shown; the sandbox shows them empty."""
    found: list[str] = []
    pending = list(_shown())
    while pending:
        with suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    (found if entry.name in _PACKAGES else pending).append(entry.path)
    return sorted(found)


def _links() -> list[str]:
    """Return the symbolic links at the top of the root, such as ``/lib`` to ``usr/lib``."""
    return [path for path in _ROOTS if Path(path).is_symlink()]


def _bwrap(disk_mib: int, *, server: bool = False) -> list[str]:
    line = ["bwrap", "--unshare-all", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    # A fork server makes namespaces for its jobs. It ends when its socket is closed, and not when the thread does that
    # happened to start it.
    line += ["--cap-add", "CAP_SYS_ADMIN"] if server else ["--die-with-parent"]
    line += ["--uid", "65534", "--gid", "65534", "--hostname", "sandbox"]
    for path in _shown():
        line += ["--ro-bind", path, path]
    for path in _links():
        line += ["--symlink", str(Path(path).readlink()), path]
    for path in _hidden():
        line += ["--size", "4096", "--tmpfs", path, "--remount-ro", path]
    for device in _DEVICES:
        line += ["--dev-bind", device, device]
    line += ["--ro-bind-try", _LINKER_CACHE, _LINKER_CACHE]
    # No /proc is mounted: it would show who else is there, and root outside may write in it, however it is mapped here.
    line += ["--dir", "/proc"]
    line += ["--size", str(disk_mib << 20), "--tmpfs", "/work"]
    return [*line, "--remount-ro", "/", "--chdir", "/work", "--"]


# $1 mount point, $2 size, $3 not empty for a fork server, then what is shown up to "--", then what is covered up to
# "--", then the command.
_SETUP = """
set -e
root=$1; size=$2; server=$3; shift 3
mount -t tmpfs -o size=1m,mode=755 none "$root"
while [ "$1" != -- ]; do
  if [ -L "$1" ]; then cp -P "$1" "$root$1"
  elif [ -d "$1" ]; then
    mkdir -p "$root$1"; mount --rbind "$1" "$root$1"; mount -o remount,bind,ro,nosuid,nodev "$root$1"
  elif [ -e "$1" ]; then
    mkdir -p "$root${1%/*}"; : > "$root$1"; mount --bind "$1" "$root$1"
  fi
  shift
done
shift
while [ "$1" != -- ]; do mount -t tmpfs -o ro,size=4k,nosuid,nodev none "$root$1"; shift; done
shift
mkdir -p "$root/proc" "$root/work"
mount -t tmpfs -o "size=$size",nr_inodes=1024,mode=777,nosuid,nodev none "$root/work"
mount -o remount,ro "$root"
# A fork server keeps its capabilities in this namespace, to make others for its jobs, which give them up.
[ "$server" ] && exec chroot "$root" env -i -C /work "$@"
exec chroot "$root" setpriv --no-new-privs --bounding-set=-all --inh-caps=-all env -i -C /work "$@"
"""
_MOUNT_POINTS = ("/mnt", "/media", "/srv", "/tmp")


def _namespaces(disk_mib: int, *, server: bool = False) -> list[str]:
    shown = [*_shown(), *_links(), *_DEVICES, _LINKER_CACHE]
    line = ["unshare", "--user", "--map-root-user", "--mount", "--net", "--ipc", "--uts", "--pid", "--fork"]
    line += ["--kill-child", "--", "/bin/sh", "-c", _SETUP, "setup"]
    # The new root covers its mount point, so that must not lie above anything that is shown.
    free = (m for m in _MOUNT_POINTS if Path(m).is_dir() and not any(Path(n).is_relative_to(m) for n in shown))
    line += [next(free, "/mnt"), str(disk_mib << 20), "server" if server else ""]
    return [*line, *shown, "--", *_hidden(), "--"]


BACKENDS: dict[str, Callable[..., list[str]]] = {"bwrap": _bwrap, "namespaces": _namespaces}
"""Name of a backend to the command line that precedes the command, for a size of the working directory in MiB."""


def command(backend: str, disk_mib: int, arguments: Sequence[str], *, server: bool = False) -> list[str]:
    """Return the command line that runs the interpreter inside a backend, or, for another name, in no sandbox."""
    python = [_interpreter(), "-I", "-S", "-B", *arguments]
    return [*BACKENDS[backend](disk_mib, server=server), *python] if backend in BACKENDS else python


@cache
def working(backend: str) -> bool:
    """Return whether a backend can run a trivial program on this machine; it is tried once."""
    line = command(backend, 1, ["-c", "print(1)"])
    try:
        done = subprocess.run(line, env={"PATH": PATH}, capture_output=True, timeout=_PROBE_SECONDS, check=False)
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
    if not any(working(name) for name in BACKENDS):
        return "neither bubblewrap nor unprivileged namespaces work here"
    return ""


def available_backend() -> str | None:
    """Return ``bwrap``, ``namespaces``, or None where this machine cannot isolate a program."""
    return None if unusable() else next(name for name in BACKENDS if working(name))
