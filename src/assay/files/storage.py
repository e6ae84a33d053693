"""Files that are either complete under their name or not there.

`PartialFile` grows line by line under ``<name>.partial`` and can be resumed after a crash;
`write_atomic` writes a small file at once. Both take the final name in one rename.
"""

import errno
import fcntl
import io
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryFile
from typing import Self, TypeVar

from assay.errors import AssayError, DataError, StorageError, UsageError
from assay.files.jsonl import dumps, loads

T = TypeVar("T")

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
    """Return the three-part form of an error of the operating system about a file or directory."""
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
    # A rename is durable only once the directory is on disk.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(file: io.FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _check_place(path: Path, *, overwrite: bool) -> None:
    """Refuse a path with something that is not to be replaced: a rename would put a file in the
    place of /dev/null.
    """
    with _storing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "")
        exists = path.exists()
    if exists and not path.is_file():
        do = "write to a file, and copy it from there"
        raise StorageError(
            f"{path} is a pipe or a device", wanted="a file that can be written", do=do
        )
    if exists and not overwrite:
        do = "choose another one, or pass --overwrite (in Python overwrite=True)"
        raise UsageError(f"{path} exists", wanted="a new file name", do=do)


def check_new_file(path: str | Path, *, overwrite: bool = False) -> None:
    """Refuse a path at which no new file can be written, before the work whose result it is for;
    writes nothing.

    A file that exists and is not to be replaced is a UsageError. A StorageError is a directory, a
    pipe or a device in its place, or a folder that is not there or takes no file.
    """
    path = Path(path)
    _check_place(path, overwrite=overwrite)
    with _storing(path):
        if not stat.S_ISDIR(path.parent.stat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "")
        _try_file(path.parent)


def check_folder(path: Path, *, new: bool = False) -> None:
    """Refuse a path at which there is no directory but something else, or one that must be ``new``
    and holds files.

    A StorageError is a directory that takes no file, or cannot be made.
    """
    if file := next((one for one in path.parents if one.exists() and not one.is_dir()), None):
        raise UsageError(
            f"{path}, of which {file} is a file", wanted="a directory", do="choose another"
        )
    if path.exists() and not (path.is_dir() and not (new and any(path.iterdir()))):
        wanted, do = (
            ("a new or empty directory", ", or --overwrite") if new else ("a directory", "")
        )
        raise UsageError(f"{path}, which exists", wanted=wanted, do=f"choose another{do}")
    with _storing(path):
        _try_file(next(one for one in (path, *path.parents) if one.exists()))


def _try_file(folder: Path) -> None:
    """Make and remove a file in a folder: permissions do not tell root that /proc takes none."""
    TemporaryFile(dir=folder).close()


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a whole file, replacing an older one in one step; on a StorageError the older one is
    untouched.
    """
    path = Path(path)
    _check_place(path, overwrite=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
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
    """Write a whole file of lines of canonical JSON, as :func:`write_atomic`; replace one only if
    it may be.
    """
    _check_place(Path(path), overwrite=overwrite)
    write_atomic(path, "".join(f"{line}\n" for line in lines))


def write_jsonl(path: str | Path, records: Iterable[object]) -> None:
    """Write a whole JSON Lines file, one record per line, in place of one that is there."""
    write_lines(path, map(dumps, records), overwrite=True)


class PartialFile:
    """A JSON Lines file written as it grows, crash-safe and resumable, by one writer at a time.

    Lines go to ``<path>.partial``; `commit` gives the file its final name. Without it the partial
    file stays, and the next `PartialFile` of the same path goes on after `recover`::

        with PartialFile(path) as file:
            done = file.recover()
            file.append({"nonce": 7})
            file.commit()

    Args:
        path: Final name.
        overwrite: Whether a file that has the final name already may be replaced.

    Raises:
        UsageError: The final file exists and ``overwrite`` is not set.
        StorageError: The partial file cannot be opened, or another writer holds it.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self._overwrite = overwrite
        _check_place(self.path, overwrite=overwrite)
        self.partial = self.path.with_name(self.path.name + ".partial")
        with _storing(self.partial):
            self._file = io.FileIO(
                os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666), "r+"
            )
        try:
            self._lock()
        except AssayError:
            self._file.close()
            raise

    def _lock(self) -> None:
        with _storing(self.partial):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Between opening and locking, the other writer may have given this very file its
                # final name.
                is_ours = self.partial.exists() and os.path.samestat(
                    os.fstat(self._file.fileno()), self.partial.stat()
                )
            except BlockingIOError:
                is_ours = False
        if not is_ours:
            wanted = "one writer per file"
            do = "wait for it to end, or choose another file name"
            raise StorageError(
                f"{self.partial} is being written by another process", wanted=wanted, do=do
            )

    def recover(self) -> list[str]:
        """Return the intact lines that an earlier writer left, without line ends; whatever follows
        them is cut off.

        A line is intact when it ends with a newline and is a strict JSON object. The first one that
        is not, and all after it, are lost: a crash tears the end of a file. A file whose first line
        is not intact is something else.
        """
        with _storing(self.partial):
            self._file.seek(0)
            *complete, _torn = self._file.readall().split(b"\n")
            intact = list(takewhile(_is_intact, complete))
            if complete and not intact:
                wanted = "lines of JSON, or no such file"
                do = "move it away, or choose another file name"
                raise StorageError(
                    f"{self.partial} is not what an earlier run left", wanted=wanted, do=do
                )
            self._file.truncate(sum(len(raw) + 1 for raw in intact))
        return [raw.decode() for raw in intact]

    def resume(self, first: str, most: int, read: Callable[[int, bytes], T]) -> list[T]:
        """Return what an earlier run left after the first line; a file without lines begins with
        it.

        A file that begins with another line is of another run, and refused. One that died between
        its last line and the final name left more than ``most`` lines after the first; those are
        cut off. Every line is read by a function of its number, from 2, and its bytes.
        """
        lines = self.recover()
        if not lines:
            self.append_lines([first])
            return []
        if lines[0] != first:
            seen = f"{self.partial} was begun with other arguments, another model or another engine"
            do = "repeat that command with all its flags, or remove the partial file to start again"
            raise UsageError(seen, wanted="the same command as the interrupted one", do=do)
        kept = lines[: most + 1]
        values = [
            read(number, f"{line}\n".encode()) for number, line in enumerate(kept[1:], start=2)
        ]
        if len(lines) > len(kept):
            self.restart()
            self.append_lines(kept)
        return values

    def restart(self) -> None:
        """Drop what an earlier writer left."""
        with _storing(self.partial):
            self._file.truncate(0)

    def append(self, record: object) -> str:
        """Write one record as a line of its own, handed to the system before this returns; gives
        the line back.
        """
        line = dumps(record)
        self.append_lines([line])
        return line

    def append_lines(self, lines: Iterable[str]) -> None:
        """Write a batch of lines (canonical JSON without line ends) in one go, after what an
        earlier writer left.

        On a StorageError the lines that were written stay in the partial file.
        """
        with _storing(self.partial):
            _write_all(self._file, "".join(line + "\n" for line in lines).encode())

    def commit(self) -> None:
        """Put all lines on disk and give the file its final name, in one step; nothing can be
        appended after.

        The partial file stays where that fails, or a file of this name that is not to be replaced
        has appeared.
        """
        _check_place(self.path, overwrite=self._overwrite)
        with _storing(self.path):
            os.fsync(self._file.fileno())
            self.partial.replace(self.path)
            _sync_directory(self.path.parent)
        self.close()

    def close(self) -> None:
        """Release the file; without `commit` the partial file stays for a later run. Closing twice
        is fine.
        """
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _is_intact(raw: bytes) -> bool:
    try:
        loads(raw, "partial file")
    except DataError:
        return False
    return True
