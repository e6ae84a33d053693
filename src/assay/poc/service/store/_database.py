"""The database: one SQLite file, one writing process, and nothing acknowledged before it is on disk."""

import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import ConnectionPoolEntry

from assay.errors import StorageError
from assay.poc.service.store._schema import MIGRATIONS

__all__ = ["Database"]

BUSY_TIMEOUT_MS = 5000


class Database:
    """Opens the file, brings its schema up to date, and hands out transactions.

    Args:
        data_dir: made if it is not there; readable by its owner only.
        exclusive: whether this process is the service of that directory. The command line opens it beside a
            running service.

    Raises:
        StorageError: another service has the directory, it cannot be written, or a newer version wrote it.
    """

    def __init__(self, data_dir: Path, *, exclusive: bool = True) -> None:
        self.path = data_dir / "service.sqlite3"
        self._lock_file: int | None = None
        self._writing = threading.Lock()
        try:
            data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            if exclusive:
                self._lock_file = _lock(data_dir / "lock")
        except OSError as error:
            raise StorageError(
                f"{data_dir}: {error.strerror}", wanted="a directory that can be written", do="pass another --data-dir"
            ) from None
        self._engine = sa.create_engine(f"sqlite:///{self.path}", pool_size=8, max_overflow=32)
        sa.event.listen(self._engine, "connect", _on_connect)
        sa.event.listen(self._engine, "begin", _on_begin)
        self._writer = self._engine.execution_options(assay_write=True)
        with _storing(self.path):
            self._set_journal()
        with self.write() as connection:
            _migrate(connection)
        self._tables = sa.MetaData()
        self._tables.reflect(self._engine)

    def __getitem__(self, table: str) -> sa.Table:
        return self._tables.tables[table]

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Open a transaction that sees one consistent state and does not wait for writers."""
        with _storing(self.path), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Open a transaction that is on disk when the block ends, or has changed nothing.

        Raises:
            StorageError: there is no room, or the file cannot be written.
        """
        # SQLite lets waiting writers poll; a lock of our own is fair among the threads of this process.
        with _storing(self.path), self._writing, self._writer.begin() as connection:
            yield connection

    def _set_journal(self) -> None:
        # Kept in the file, so once is enough; it cannot be set within a transaction.
        with self._engine.connect() as connection:
            raw = connection.connection.dbapi_connection
            assert raw is not None
            raw.execute("PRAGMA journal_mode=WAL")

    def close(self) -> None:
        """Close every connection and give up the directory."""
        self._engine.dispose()
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StorageError(
            f"another service runs in {path.parent}",
            wanted="a data directory of its own for every service",
            do="stop the other one, or pass another --data-dir",
        ) from None
    return descriptor


def _on_connect(connection: Any, record: ConnectionPoolEntry) -> None:
    # The driver must not open transactions by itself: see _on_begin.
    connection.isolation_level = None
    for pragma in (
        f"busy_timeout={BUSY_TIMEOUT_MS}",
        "synchronous=FULL",
        "foreign_keys=ON",
        "journal_size_limit=8388608",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def _on_begin(connection: sa.Connection) -> None:
    # A deferred transaction that starts to write fails at once where another has written meanwhile.
    write = connection.get_execution_options().get("assay_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


@contextmanager
def _storing(path: Path) -> Iterator[None]:
    try:
        yield
    except (sa.exc.OperationalError, sa.exc.TimeoutError, sqlite3.OperationalError) as error:
        # The last kind comes from the pragmas of a new connection, where nothing wraps it.
        reason = getattr(error, "orig", None) or error
        raise StorageError(
            f"{path}: {reason}",
            wanted="a database that can be written",
            do="free some space on that disk; the service continues by itself",
        ) from error
    except sa.exc.DatabaseError as error:
        if isinstance(error, sa.exc.IntegrityError):
            raise
        raise StorageError(
            f"{path}: {error.orig}", wanted="a database of this service", do="restore it, or pass another --data-dir"
        ) from error


def _migrate(connection: sa.Connection) -> None:
    connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS migrations (version INTEGER PRIMARY KEY, applied_at REAL)")
    current = connection.exec_driver_sql("SELECT coalesce(max(version), 0) FROM migrations").scalar_one()
    if current > len(MIGRATIONS):
        raise StorageError(
            f"a database of schema {current}",
            wanted=f"schema {len(MIGRATIONS)} or older",
            do="run the version of assay that wrote it, or pass another --data-dir",
        )
    for version, statements in enumerate(MIGRATIONS[current:], start=current + 1):
        for statement in statements:
            connection.exec_driver_sql(statement)
        connection.exec_driver_sql("INSERT INTO migrations VALUES (?, ?)", (version, time.time()))
