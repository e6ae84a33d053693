"""Files that are either complete under their name or do not exist.

`PartialFile` grows line by line under ``<name>.partial`` and can be resumed after a crash;
`write_atomic` writes a small file at once. Both take the final name in one rename.
"""

import errno
import fcntl
import io
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import TypeVar

from assay.errors import AssayError, DataError, StorageError, UsageError
from assay.files.jsonl import dumps, loads

T = TypeVar("T")

LOCK = ".lock"  # file of a directory that has one writer
_SYNC_EVERY = 30.0  # seconds of a growing file that a power cut may lose

_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EFBIG: "raise the file size limit (ulimit -f)",
    errno.EACCES: "choose a directory you may write to",
    errno.EROFS: "choose a directory you may write to",
    errno.EISDIR: "choose a file name, or remove the directory",
    errno.ENOENT: "create the directory first",
    errno.ENOTDIR: "choose a path whose parents are directories",
}


def storage_error(path: Path, error: OSError) -> StorageError:
    """Return an operating system's error about a file as a StorageError with advice."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    advice = _ADVICE.get(error.errno or 0, "choose another path, or repair this one")
    if error.errno == errno.ENOENT and path.parent.is_dir():
        advice = "choose another directory: this one takes no new files"
    return StorageError(f"{path}: {reason}", wanted="a file that can be written", do=advice)


@contextmanager
def _storing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from error


def _sync_directory(path: Path) -> None:
    # A rename is durable only once the directory is on disk. One that takes files may not be read.
    with suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_all(file: io.FileIO, data: bytes) -> None:
    view = memoryview(data)
    # An unbuffered file may take a part of the data only.
    while view:
        view = view[file.write(view) :]


def _check_place(path: Path, *, overwrite: bool) -> None:
    """Refuse a path whose present content is not to be replaced."""
    with _storing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "")
        exists = path.exists()
    if exists and not path.is_file():
        # A rename would put a regular file in the place of /dev/null.
        raise StorageError(
            f"{path} is a pipe or a device",
            wanted="a file that can be written",
            do="write to a file, and copy it from there",
        )
    if exists and not overwrite:
        raise UsageError(
            f"{path} exists",
            wanted="a new file name",
            do="choose another one, or pass --overwrite (in Python overwrite=True)",
        )


def cache_folder() -> Path:
    """Return the user's folder of what can be made again: ``assay`` under ``XDG_CACHE_HOME`` or
    ``~/.cache``, else, without a home that can be written, a folder of this user's own among
    temporary files.

    Raises:
        StorageError: Another user made that folder, or may write into it.
    """
    if asked := os.environ.get("XDG_CACHE_HOME"):
        return Path(asked) / "assay"
    with suppress(RuntimeError):  # a user without a home
        caches = Path.home() / ".cache"
        # The first that is there is written into: ~/.cache may belong to root, and the home not.
        folders = (caches / "assay", caches, caches.parent)
        nearest = next((folder for folder in folders if os.access(folder, os.F_OK)), None)
        if nearest is not None and os.access(nearest, os.W_OK):
            return caches / "assay"
    own = Path(gettempdir()) / f"assay-{os.geteuid()}"
    with suppress(FileExistsError):
        own.mkdir(mode=0o700)
    status = own.lstat()
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise StorageError(
            f"{own}, which others can write or have made",
            wanted="a folder of this user alone",
            do="name a cache in XDG_CACHE_HOME",
        )
    return own


def check_new_file(path: str | Path, *, overwrite: bool = False) -> None:
    """Refuse a path at which no file can be written, before the work that it is for.

    An existing file without ``overwrite`` is a UsageError. A directory, a pipe or a device in its
    place is a StorageError, and so is a folder that does not exist or takes no file.
    """
    path = Path(path)
    _check_place(path, overwrite=overwrite)
    with _storing(path):
        if not stat.S_ISDIR(path.parent.stat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "")
        # Permissions do not tell root that /proc takes no file.
        TemporaryFile(dir=path.parent).close()
        # A longer name than that of the result, under which a file may grow.
        with suppress(FileNotFoundError):
            path.with_name(f"{path.name}.partial").lstat()


def check_folder(path: Path, *, new: bool = False) -> None:
    """Refuse a path that cannot be a directory, or with ``new`` one that has files.

    A directory that takes no file, or cannot be made, is a StorageError.
    """
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise UsageError(
                f"{path}, of which {parent} is a file", wanted="a directory", do="choose another"
            )
    if path.exists() and not path.is_dir():
        raise UsageError(
            f"{path}, which exists",
            wanted="a new or empty directory" if new else "a directory",
            do="choose another",
        )
    if new and path.exists() and any(path.iterdir()):
        raise UsageError(
            f"{path}, which exists",
            wanted="a new or empty directory",
            do="choose another, or --overwrite",
        )
    with _storing(path):
        nearest = next(folder for folder in (path, *path.parents) if folder.exists())
        TemporaryFile(dir=nearest).close()


def check_new_folder(path: Path) -> None:
    """Refuse a path that exists, or at which no directory can be made."""
    if path.exists():
        raise UsageError(
            f"{path} exists", wanted="a new directory", do="choose another path or remove it"
        )
    check_folder(path)


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a whole file in one step; on a StorageError an older file is untouched."""
    path = Path(path)
    _check_place(path, overwrite=True)
    # Every process and thread has a temporary file of its own.
    temporary = path.with_name(f".assay-{os.getpid()}-{threading.get_ident()}.tmp")
    with _storing(path):
        try:
            with io.FileIO(temporary, "w") as file:
                _write_all(file, content.encode() if isinstance(content, str) else content)
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_directory(path.parent)


def write_lines(path: str | Path, lines: Iterable[str], *, overwrite: bool = False) -> None:
    """Write a whole file of lines in one step; an existing one needs ``overwrite``."""
    _check_place(Path(path), overwrite=overwrite)
    write_atomic(path, "".join(f"{line}\n" for line in lines))


def write_jsonl(path: str | Path, records: Iterable[object]) -> None:
    """Write a whole JSON Lines file in one step, one record per line, and replace an older one."""
    write_lines(path, map(dumps, records), overwrite=True)


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of a directory, ``.lock`` in it, which is made if it is missing.

    Raises:
        StorageError: Another process holds it, or the directory cannot be written.
    """
    with ExitStack() as held:
        with _storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(io.FileIO(folder / LOCK, "a"))
            if not _lock(file):
                raise _is_held(folder)
        yield


def _lock(file: io.FileIO) -> bool:
    """Lock a file until it is closed, and return whether no other process has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_held(path: Path) -> StorageError:
    return StorageError(
        f"{path} is being written by another process",
        wanted="one writer at a time",
        do="wait for it to end, or choose another name",
    )


class PartialFile(AbstractContextManager["PartialFile"]):
    """A JSON Lines file that grows line by line, crash-safe and resumable, with one writer.

    Lines go to ``<path>.partial``; `commit` gives the file its final name. Without it the partial
    file stays, and the next `PartialFile` of the same path goes on after `recover`::

        with PartialFile(path) as file:
            lines = file.recover()
            file.append_lines([dumps({"nonce": 7})])
            file.commit()

    Args:
        path: Final name.
        overwrite: Whether an existing file of that name may be replaced.

    Raises:
        UsageError: The final file exists and ``overwrite`` is not set.
        StorageError: The partial file cannot be opened, or another writer holds it.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self._overwrite = overwrite
        self._synced = time.monotonic()
        _check_place(self.path, overwrite=overwrite)
        self.partial = self.path.with_name(self.path.name + ".partial")
        with _storing(self.partial):
            self._file = io.FileIO(self.partial, "a+")
        try:
            self._lock()
        except AssayError:
            self._file.close()
            raise

    def _lock(self) -> None:
        with _storing(self.partial):
            # Between opening and locking, the other writer may have given this very file its final
            # name.
            is_ours = (
                _lock(self._file)
                and self.partial.exists()
                and os.path.samestat(os.fstat(self._file.fileno()), self.partial.stat())
            )
        if not is_ours:
            raise _is_held(self.partial)

    def recover(self) -> list[str]:
        """Return the intact lines of an earlier writer, without line ends, and cut off the rest.

        A line is intact when it ends with a newline and is a strict JSON object. A crash tears the
        end of a file, so the first line that is not intact and all after it are lost. A file whose
        first line is not intact is something else, and a StorageError.
        """
        with _storing(self.partial):
            self._file.seek(0)
            *complete, _torn = self._file.readall().split(b"\n")
            intact = list(takewhile(_is_intact, complete))
            if complete and not intact:
                raise StorageError(
                    f"{self.partial} is not what an earlier run left",
                    wanted="lines of JSON, or no such file",
                    do="move it away, or choose another file name",
                )
            self._file.truncate(sum(len(line) + 1 for line in intact))
        return [line.decode() for line in intact]

    def resume(self, first: str, most: int, read: Callable[[int, bytes], T]) -> list[T]:
        """Return what an earlier run wrote after its first line; an empty file gets that line.

        A run that died between its last line and the final name may have written too many lines;
        those are cut off.

        Args:
            first: First line of this run. A file that begins with another one is a UsageError.
            most: Number of lines after the first that this run writes at most.
            read: Function of the number of a line, from 2, and its bytes.
        """
        lines = self.recover()
        if not lines:
            self.append_lines([first])
            return []
        if lines[0] != first:
            raise UsageError(
                f"{self.partial} was begun with other arguments, another model or another engine",
                wanted="the same command as the interrupted one",
                do="repeat that command with all its flags, or remove the partial file to restart",
            )
        # More lines are the footer of a run that ended before its file was renamed.
        usable = lines[: most + 1]
        values = [
            read(number, f"{line}\n".encode()) for number, line in enumerate(usable[1:], start=2)
        ]
        if len(lines) > len(usable):
            # What is usable is never off the disk.
            with _storing(self.partial):
                self._file.truncate(len("\n".join([*usable, ""]).encode()))
        return values

    def restart(self) -> None:
        """Delete all lines of the partial file."""
        with _storing(self.partial):
            self._file.truncate(0)

    def append_lines(self, lines: Iterable[str]) -> None:
        """Write lines of canonical JSON, without line ends, in one go after the earlier ones.

        On a StorageError the lines that were written stay in the partial file.
        """
        with _storing(self.partial):
            _write_all(self._file, "".join(line + "\n" for line in lines).encode())
            if time.monotonic() - self._synced >= _SYNC_EVERY:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()

    def commit(self) -> None:
        """Put all lines on disk, give the file its final name in one step, and close it.

        The partial file stays where that fails, or where a file of this name has appeared that is
        not to be replaced.
        """
        _check_place(self.path, overwrite=self._overwrite)
        with _storing(self.path):
            # The lines are on disk before the file has its final name.
            os.fsync(self._file.fileno())
            self.partial.replace(self.path)
            _sync_directory(self.path.parent)
        self.close()

    def close(self) -> None:
        """Close the file; without `commit` the partial file stays for a later run. Idempotent."""
        self._file.close()

    def __exit__(self, *error: object) -> None:
        self.close()


def _is_intact(line: bytes) -> bool:
    try:
        loads(line, "partial file")
    except DataError:
        return False
    return True
