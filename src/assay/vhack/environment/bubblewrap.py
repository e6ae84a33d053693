"""Isolation by bubblewrap.

New user, process, network, IPC, host-name and mount namespaces, no capability, and a small working
directory in memory that vanishes with the run. The read-only root holds programs and libraries of
/usr and the interpreter's own; directories of installed packages are covered by empty ones.
"""

import shutil
import subprocess
from functools import cache
from pathlib import Path

from assay.vhack.environment.visible import (
    DEVICES,
    LINKER_CACHE,
    PATH,
    ROOTS,
    hidden,
    python,
    shown,
)

_PROGRAM = "bwrap"
_PROBE_SECONDS = 10


def command_line(disk_mib: int, *, server: bool = False) -> list[str]:
    """Return the command line in front of a command; the working directory holds ``disk_mib``."""
    line = [
        shutil.which(_PROGRAM) or _PROGRAM,
        *("--unshare-all", "--new-session", "--clearenv", "--cap-drop", "ALL"),
        # A fork server makes namespaces for its jobs. It ends when its socket is closed, and not
        # when the thread does that happened to start it.
        *(("--cap-add", "CAP_SYS_ADMIN") if server else ("--die-with-parent",)),
        *("--uid", "65534", "--gid", "65534", "--hostname", "sandbox"),
    ]
    for path in shown():
        line += ["--ro-bind", path, path]
    for path in ROOTS:
        # /lib is often a link to usr/lib.
        if Path(path).is_symlink():
            line += ["--symlink", str(Path(path).readlink()), path]
    for path in hidden():
        line += ["--size", "4096", "--tmpfs", path, "--remount-ro", path]
    for device in DEVICES:
        line += ["--dev-bind", device, device]
    return [
        *line,
        *("--ro-bind-try", LINKER_CACHE, LINKER_CACHE),
        # No /proc is mounted: it would show who else is there, and root outside may write in it,
        # however it is mapped here.
        *("--dir", "/proc"),
        *("--size", str(disk_mib << 20), "--tmpfs", "/work"),
        *("--remount-ro", "/", "--chdir", "/work", "--"),
    ]


@cache
def unusable() -> str:
    """Return why bubblewrap cannot run a trivial program here, or an empty text; tried once."""
    if shutil.which(_PROGRAM) is None:
        return "bubblewrap is not installed"
    line = [*command_line(1), *python("-c", "print(1)")]
    try:
        probe = subprocess.run(
            line, env={"PATH": PATH}, capture_output=True, timeout=_PROBE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bubblewrap does not work here ({type(error).__name__})"
    if probe.returncode != 0 or probe.stdout != b"1\n":
        lines = probe.stderr.decode(errors="replace").split("\n")
        return f"bubblewrap does not work here ({lines[0][:100]})"
    return ""
