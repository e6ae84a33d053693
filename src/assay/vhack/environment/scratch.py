"""The working directory of a job on disk: measured while the job runs, removed when it ends.

It is part of what runs inside a sandbox, so it needs the standard library only. A directory on disk
has no size of its own. So it is measured while the job runs, and what a job keeps there can exceed
its bound for as long as a measurement is apart from the next.
"""

import os
import stat
from itertools import count

FILES = 1024
"""How many files, directories and links it may hold: they cost room even when they are empty."""

FILE_CHARACTERS = 4096
"""How much of a file is reported."""

_DESCRIPTORS = range(3, 64)


def make_folder(root: str) -> str:
    """Make an empty directory with an unpredictable name below ``root``."""
    path = f"{root}/{os.urandom(8).hex()}"
    os.mkdir(path, 0o700)  # noqa: PTH102
    return path


def overflows(path: str, process: int, n_bytes: int) -> bool:
    """Return whether a job keeps more than it may, deleted files included that it holds open."""
    used = entries = 0
    pending = [path]
    try:
        while pending and entries <= FILES and used <= n_bytes:
            with os.scandir(pending.pop()) as scanned:
                for entry in scanned:
                    entries += 1
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    else:
                        used += _room(entry.stat(follow_symlinks=False))
    except FileNotFoundError:  # the job has just removed it
        return False
    except OSError:  # a directory that cannot be read, or that lies too deep
        return True
    for descriptor in _DESCRIPTORS:
        try:
            status = os.stat(f"/proc/{process}/fd/{descriptor}")  # noqa: PTH116
        except OSError:
            continue
        if status.st_nlink == 0 and stat.S_ISREG(status.st_mode):
            used += _room(status)
    return entries > FILES or used > n_bytes


def _room(status: os.stat_result) -> int:
    # Blocks of this size, whatever those of the file system are.
    return status.st_blocks * 512


def remove_folder(path: str) -> None:
    """Remove a directory with all below it, however deep and whatever its permissions.

    Directories are moved to the top before they are emptied, so no path becomes too long. The job
    must have ended.
    """
    pending = [path]
    numbers = count()
    while pending:
        folder = pending.pop()
        with os.scandir(folder) as scanned:
            entries = list(scanned)
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                os.chmod(entry.path, 0o700)  # noqa: PTH101
                lifted = f"{path}-{next(numbers)}"
                os.rename(entry.path, lifted)  # noqa: PTH104
                pending.append(lifted)
            else:
                os.unlink(entry.path)  # noqa: PTH108
        os.rmdir(folder)  # noqa: PTH106
