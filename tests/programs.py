"""Programs that tests call, by the Debian package that has them.

``python3 tests/programs.py`` prints the packages that this machine lacks; it needs Python alone.
"""

import os
import shutil
from collections.abc import Iterable

PACKAGES = {
    "amtool": "prometheus-alertmanager",
    "bwrap": "bubblewrap",
    "caddy": "caddy",
    "chromium": "chromium",
    "curl": "curl",
    "git": "git",
    "groff": "groff-base",
    "jq": "jq",
    "nginx": "nginx-light",
    "node": "nodejs",
    "openssl": "openssl",
    "promtool": "prometheus",
    "sandbox": "bubblewrap",  # any that works: conftest.py tries one
    "sqlite3": "sqlite3",
    "systemd-analyze": "systemd",
    "tsc": "node-typescript",
}


def place(program: str) -> str | None:
    """Return the path of a program, or None where it is missing.

    Servers are installed to /usr/sbin, which ordinary users do not have on their path.
    """
    folders = (os.environ.get("PATH", os.defpath), "/usr/sbin")
    return shutil.which(program, path=os.pathsep.join(folders))


def packages(programs: Iterable[str]) -> list[str]:
    """Return the packages that have some programs."""
    return sorted({PACKAGES[name] for name in programs})


if __name__ == "__main__":
    programs = PACKAGES.keys() - {"sandbox"}
    print(*packages(name for name in programs if place(name) is None))
