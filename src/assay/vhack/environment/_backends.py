"""The ways to shut a process in: bubblewrap, or the same namespaces set up by util-linux.

Both give a new user, process, network, IPC, host-name and mount namespace, no capability, a read-only root that
holds only ``/usr`` and the interpreter, and a small working directory in memory that vanishes with the run.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from shutil import which

__all__ = ["BACKENDS", "PATH", "command", "source", "usable", "working"]

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_PROBE_SECONDS = 10
_LIBRARIES = ("/bin", "/lib", "/lib32", "/lib64")


def interpreter() -> str:
    """The interpreter itself, not the link of a virtual environment: the sandbox does not see that."""
    return str(Path(getattr(sys, "_base_executable", None) or sys.executable).resolve())


def _prefixes() -> list[str]:
    """Directories the interpreter needs beside ``/usr``."""
    roots = {str(Path(sys.base_prefix).resolve()), str(Path(interpreter()).parent)}
    outside = sorted(root for root in roots if not Path(root).is_relative_to("/usr"))
    return [
        root for root in outside if not any(root != other and Path(root).is_relative_to(other) for other in outside)
    ]


def _bwrap(disk_mib: int, *, server: bool = False) -> list[str]:
    line = ["bwrap", "--unshare-all", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    # A fork server makes namespaces for its jobs. It ends when its socket is closed, and not when the thread does that
    # happened to start it.
    line += ["--cap-add", "CAP_SYS_ADMIN"] if server else ["--die-with-parent"]
    line += ["--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--ro-bind", "/usr", "/usr"]
    for name in _LIBRARIES:
        if Path(name).is_symlink():
            line += ["--symlink", str(Path(name).readlink()), name]
        elif Path(name).is_dir():
            line += ["--ro-bind", name, name]
    for prefix in _prefixes():
        line += ["--ro-bind", prefix, prefix]
    line += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--dev", "/dev", "--remount-ro", "/dev"]
    # No /proc is mounted: it would show who else is there, and root outside may write in it, however it is mapped here.
    line += ["--dir", "/proc"]
    line += ["--size", str(disk_mib << 20), "--tmpfs", "/work"]
    return [*line, "--remount-ro", "/", "--chdir", "/work", "--"]


# $1 mount point, $2 size, $3 not empty for a fork server, then directories up to "--", then the command.
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
mkdir -p "$root/proc" "$root/work"
mount -t tmpfs -o "size=$size",nr_inodes=1024,mode=777,nosuid,nodev none "$root/work"
mount -o remount,ro "$root"
# A fork server keeps its capabilities in this namespace, to make others for its jobs, which give them up.
[ "$server" ] && exec chroot "$root" env -i -C /work "$@"
exec chroot "$root" setpriv --no-new-privs --bounding-set=-all --inh-caps=-all env -i -C /work "$@"
"""
_MOUNT_POINTS = ("/mnt", "/media", "/srv", "/tmp")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/etc/ld.so.cache")


def _namespaces(disk_mib: int, *, server: bool = False) -> list[str]:
    needed = ["/usr", *_LIBRARIES, *_prefixes(), *_DEVICES]
    line = ["unshare", "--user", "--map-root-user", "--mount", "--net", "--ipc", "--uts", "--pid", "--fork"]
    line += ["--kill-child", "--", "/bin/sh", "-c", _SETUP, "setup"]
    # The new root covers its mount point, so that must not lie above anything that is needed.
    free = (m for m in _MOUNT_POINTS if Path(m).is_dir() and not any(Path(n).is_relative_to(m) for n in needed))
    return [*line, next(free, "/mnt"), str(disk_mib << 20), "server" if server else "", *needed, "--"]


BACKENDS: dict[str, Callable[..., list[str]]] = {"bwrap": _bwrap, "namespaces": _namespaces}
"""Name of a backend to the command line that precedes the command, for a size of the working directory in MiB."""


def command(backend: str, disk_mib: int, arguments: Sequence[str], *, server: bool = False) -> list[str]:
    """The whole command line that runs the interpreter with ``arguments`` inside a backend (or in none).

    Args:
        backend: a name in `BACKENDS`, or another for none.
        disk_mib: size of the working directory.
        arguments: of the interpreter.
        server: for a fork server, which keeps what it needs to shut its jobs in.
    """
    python = [interpreter(), "-I", "-S", "-B", *arguments]
    return [*BACKENDS[backend](disk_mib, server=server), *python] if backend in BACKENDS else python


@cache
def source(name: str) -> str:
    """The text of a module of this package, for an interpreter that cannot import it."""
    return resources.files("assay.vhack.environment").joinpath(name).read_text(encoding="utf-8")


@cache
def working(backend: str) -> bool:
    """Whether a backend can run a trivial program on this machine; tried once."""
    line = command(backend, 1, ["-c", "print(1)"])
    if which(line[0], path=PATH) is None:
        return False
    try:
        done = subprocess.run(line, env={"PATH": PATH}, capture_output=True, timeout=_PROBE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and done.stdout == b"1\n"


def usable() -> str | None:
    """The first backend that works here, or None."""
    return next((name for name in BACKENDS if working(name)), None)
