"""Regular files, opened without waiting and read with a bound."""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from assay.errors import DataError


def malformed(source: str | Path, reason: str, wanted: str) -> DataError:
    """Return the error of a file whose content is not of its format."""
    return DataError(
        f"{source}: {reason}", wanted=wanted, do="repair or remove it, or write the file again"
    )


@contextmanager
def open_regular(path: str | Path) -> Iterator[BufferedReader]:
    """Open a regular file to read; a pipe, a device and an unreadable file are a DataError."""
    try:
        if "\0" in str(path):  # open would raise a ValueError
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        # Without O_NONBLOCK, opening a pipe waits for its writer, perhaps for ever.
        with open(
            path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
        ) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DataError(
                    f"{path} is a pipe or a device",
                    wanted="a regular file",
                    do="copy it to a file first",
                )
            yield file
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}",
            wanted="a file that can be read",
            do="check its path and permissions",
        ) from error


def read_whole(path: str | Path, longest: int) -> bytes:
    """Return the bytes of a regular file; more than ``longest`` of them are a DataError."""
    with open_regular(path) as file:
        content = file.read(longest + 1)
    if len(content) > longest:
        raise DataError(
            f"{path}: longer than {longest} bytes", wanted="a smaller file", do="pass another one"
        )
    return content


def digest_file(path: str | Path) -> bytes:
    """Return the SHA-256 of the bytes of a regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").digest()
