"""Isolation by Landlock, for machines without bubblewrap or without user namespaces.

Landlock is a part of the kernel by which a process gives up access to files, without any privilege.
The filter of system calls does the rest. What is weaker than with bubblewrap: a program learns
whether a path exists, its size, times and owner, and where a link points; a user's other processes
share its process numbers; and its directory is on disk, see `assay.vhack.environment.scratch`.
"""

import tempfile
from pathlib import Path

from assay.vhack.environment import confinement, visible


def unusable() -> str:
    """Return why this kernel cannot isolate by Landlock, or an empty text where it can."""
    version = confinement.landlock_version()
    if not version:
        return "this kernel has no Landlock, or it is not switched on"
    if version < confinement.MINIMUM_LANDLOCK:
        return (
            f"Landlock has version {version} here, and version {confinement.MINIMUM_LANDLOCK} "
            "(Linux 6.2) is needed"
        )
    return ""


def setup() -> dict[str, object]:
    """Return the files that a fork server can read, and the directories for its jobs among them.

    Raises:
        OSError: Temporary files would lie where every program can read.
    """
    folders = [
        *visible.standard_library(),
        *visible.library_folders(),
        *visible.DEVICES,
        *visible.SINGLES,
    ]
    if any(map(Path(tempfile.gettempdir()).resolve().is_relative_to, folders)):
        raise OSError("temporary files lie among the libraries")
    return {"readable": [*visible.readable(), *visible.DEVICES], "folders": folders}
