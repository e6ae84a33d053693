"""Connections to an SQLite file: to read another process's file, or to write one's own.

Errors of SQLite become errors of assay here.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from assay.errors import StorageError

BUSY_TIMEOUT_MS = 5000

LONGEST_VALUE = 2**26
"""Bytes of the longest text that is read from another process's file: 64 MiB."""

# Ends of the names of SQLite's files: of the database, and of those beside it.
_FILES = ("", "-journal", "-wal", "-shm")
_ADVICE = {
    sqlite3.SQLITE_BUSY: ("a moment in which no other process writes to it", "try again"),
    sqlite3.SQLITE_CANTOPEN: (
        "a file that can be opened, in a directory that can be written",
        "pass another {flag}",
    ),
    sqlite3.SQLITE_READONLY: ("a file and a directory that can be written", "pass another {flag}"),
}
_NO_ROOM = (
    "a database that can be written",
    "free some space on that disk; a service that runs continues by itself",
)


def damaged(path: Path, reason: str, *, flag: str = "--data-dir") -> StorageError:
    """Return the error of a database whose content assay did not write."""
    return StorageError(
        f"{path}: {reason}",
        wanted="a database that assay wrote",
        do=f"restore it from a backup, or pass another {flag}",
    )


def _behind_links(path: Path) -> Path:
    """Return what links lead to, beside which SQLite keeps journals; it refuses those that lead to
    themselves, for which ``Path.resolve`` has no OSError.
    """
    return Path(os.path.realpath(path))


def check_journals(path: Path, flag: str) -> None:
    """Refuse a pipe or directory in the place of a file of SQLite, which would wait."""
    path = _behind_links(path)
    for end in _FILES:
        journal = path.with_name(f"{path.name}{end}")
        if journal.exists() and not journal.is_file():
            raise StorageError(
                f"{journal} is no file",
                wanted="a file of SQLite, or none",
                do=f"remove it, or pass another {flag}",
            )


@contextmanager
def storage_errors(path: Path, flag: str) -> Iterator[None]:
    """Turn errors of SQLite and SQLAlchemy into a StorageError; an IntegrityError stays."""
    try:
        yield
    except sa.exc.IntegrityError:
        raise
    except (sa.exc.OperationalError, sa.exc.TimeoutError, sqlite3.OperationalError) as error:
        # A plain sqlite3 error comes from the pragmas of a new connection.
        reason = getattr(error, "orig", None) or error
        code = getattr(reason, "sqlite_errorcode", 0)
        if code == sqlite3.SQLITE_ERROR:  # a table or column is missing
            raise damaged(path, str(reason), flag=flag) from error
        wanted, do = _ADVICE.get(code & 0xFF, _NO_ROOM)
        raise StorageError(f"{path}: {reason}", wanted=wanted, do=do.format(flag=flag)) from error
    except (sa.exc.DatabaseError, sqlite3.DatabaseError, UnicodeDecodeError) as error:
        # SQLite's own message may be no UTF-8.
        raise damaged(path, str(getattr(error, "orig", error)), flag=flag) from error


def connect_to_read(path: Path) -> sqlite3.Connection:
    """Return a connection to another process's file, which it cannot change."""
    path = _behind_links(path)
    uri = f"file:{quote(os.fsencode(path))}?mode=ro"
    if not os.access(path.parent, os.W_OK) and not path.with_name(f"{path.name}-wal").exists():
        # No writer has it open, and the journal that SQLite would begin has no place.
        uri += "&immutable=1"
    connection = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_VALUE)
    # A text is read whatever its bytes are: a reader that does not trust a file compares hashes.
    connection.text_factory = partial(str, encoding="utf-8", errors="replace")
    _set_pragmas(connection, "trusted_schema=OFF", "query_only=ON")
    return connection


def reading_engine(path: Path) -> sa.Engine:
    """Return an engine whose connections are those of :func:`connect_to_read`."""
    engine = sa.create_engine(
        "sqlite://", creator=partial(connect_to_read, path), poolclass=QueuePool
    )
    sa.event.listen(engine, "begin", _begin)
    return engine


def writing_engine(path: Path, *, secure_delete: bool) -> sa.Engine:
    """Return an engine whose transactions are on disk when they end.

    Transactions that write have the execution option ``assay_write``.
    """
    # A URL in text would take what follows a "?" in the path for options, and open another file;
    # nor is there a file behind ":memory:" alone.
    url = sa.URL.create("sqlite", database=str(path.absolute()))
    engine = sa.create_engine(url, pool_size=8, max_overflow=32)
    sa.event.listen(engine, "connect", partial(_set_up_writing, secure_delete=secure_delete))
    sa.event.listen(engine, "begin", _begin)
    return engine


def _set_up_writing(connection: Any, record: ConnectionPoolEntry, *, secure_delete: bool) -> None:
    # The driver must not open transactions by itself: see _begin.
    connection.isolation_level = None
    _set_pragmas(
        connection,
        "journal_mode=WAL",  # the file keeps it; a transaction could not set it
        "synchronous=FULL",
        "foreign_keys=ON",
        "journal_size_limit=8388608",
        f"secure_delete={int(secure_delete)}",
    )


def _set_pragmas(connection: Any, *pragmas: str) -> None:
    """Set pragmas of a new connection, and close it where that fails: nothing else would."""
    try:
        for pragma in (f"busy_timeout={BUSY_TIMEOUT_MS}", *pragmas):
            connection.execute(f"PRAGMA {pragma}").close()
    except BaseException:
        connection.close()
        raise


def _begin(connection: sa.Connection) -> None:
    # A deferred transaction that starts to write fails at once where another has written meanwhile.
    writes = connection.get_execution_options().get("assay_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
