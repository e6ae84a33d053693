"""The database: one SQLite file, one writing process, and nothing acknowledged before it is on disk."""

import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import ConnectionPoolEntry

from assay.errors import StorageError
from assay.poc.service.store._schema import MIGRATIONS

BUSY_TIMEOUT_MS = 5000


class Database:
    """Opens the file, brings its schema up to date, and hands out transactions.

    The file is readable by its owner only, in whatever directory it lies.

    Args:
        data_dir: Directory of the file. It is created if it does not exist.
        exclusive: Whether this process is the only one that may open the file in this way. A service does; the command
            line opens the file beside a running service.
        name: Name of the file.
        migrations: Steps that lead to the schema, the oldest first.

    Raises:
        StorageError: Another service has the file, it cannot be written, or a newer version wrote it.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        exclusive: bool = True,
        name: str = "service.sqlite3",
        migrations: Sequence[Sequence[str]] = MIGRATIONS,
    ) -> None:
        self.path = data_dir / name
        self._writing = threading.Lock()
        try:
            data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = _open_private(self.path, exclusive=exclusive)
        except OSError as error:
            raise StorageError(
                f"{self.path}: {error.strerror}",
                wanted="a directory that can be written",
                do="pass another --data-dir",
            ) from None
        self._engine = sa.create_engine(f"sqlite:///{self.path}", pool_size=8, max_overflow=32)
        sa.event.listen(self._engine, "connect", _on_connect)
        sa.event.listen(self._engine, "begin", _on_begin)
        self._writer = self._engine.execution_options(assay_write=True)
        self._tables = sa.MetaData()
        try:
            with self.write() as connection:
                _migrate(connection, migrations)
            with _storing(self.path):
                self._tables.reflect(self._engine)
        except BaseException:
            self.close()
            raise

    def __getitem__(self, table: str) -> sa.Table:
        if table not in self._tables.tables:
            raise damaged(self.path, f"the table {table} is missing")
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
        # SQLite lets waiting writers poll; this lock is fair among the threads of this process.
        with _storing(self.path), self._writing, self._writer.begin() as connection:
            yield connection

    def rows(self, query: sa.Select[Any]) -> Sequence[sa.Row[Any]]:
        """Return the rows of a query."""
        with self.read() as connection:
            return connection.execute(query).all()

    def scalar(self, query: sa.Select[Any]) -> Any:
        """Return the only value of a query, or None if it has no row."""
        with self.read() as connection:
            return connection.execute(query).scalar()

    def change(self, statement: sa.UpdateBase) -> int:
        """Run a statement in a transaction of its own; return how many rows it changed."""
        with self.write() as connection:
            return connection.execute(statement).rowcount

    def close(self) -> None:
        """Close every connection and give up the directory."""
        self._engine.dispose()
        if self._file is not None:
            # Only now: closing any descriptor of the file gives up the locks that SQLite holds on it.
            os.close(self._file)
            self._file = None


def damaged(path: Path, reason: str) -> StorageError:
    """Return the error of a file that holds something other than what this version writes."""
    return StorageError(
        f"{path}: {reason}",
        wanted="a database that assay wrote",
        do="restore it from a backup, or pass another --data-dir",
    )


def _open_private(path: Path, *, exclusive: bool) -> int | None:
    """Open the database file, take its lock where it is wanted, and withdraw it from other users.

    SQLite gives its journal the permissions of the database.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if exclusive:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StorageError(
            f"another service runs in {path.parent}",
            wanted="a data directory of its own for every service",
            do="stop the other service, or pass another --data-dir",
        ) from None
    for file in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
        with suppress(PermissionError, FileNotFoundError):  # of another user, or not there yet
            file.chmod(0o600)
    return descriptor


def _on_connect(connection: Any, record: ConnectionPoolEntry) -> None:
    # The driver must not open transactions by itself: see _on_begin.
    connection.isolation_level = None
    for pragma in (
        f"busy_timeout={BUSY_TIMEOUT_MS}",
        "journal_mode=WAL",  # the file keeps it; a transaction could not set it
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
        if getattr(reason, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR:  # a table or column is missing
            raise damaged(path, str(reason)) from error
        raise StorageError(
            f"{path}: {reason}",
            wanted="a database that can be written",
            do="free some space on that disk; the service continues by itself",
        ) from error
    except sa.exc.DatabaseError as error:
        if isinstance(error, sa.exc.IntegrityError):
            raise
        raise damaged(path, str(error.orig)) from error


def _migrate(connection: sa.Connection, migrations: Sequence[Sequence[str]]) -> None:
    connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS migrations (version INTEGER PRIMARY KEY, applied_at REAL)")
    current = connection.exec_driver_sql("SELECT coalesce(max(version), 0) FROM migrations").scalar_one()
    if current > len(migrations):
        raise StorageError(
            f"a database of schema {current}",
            wanted=f"schema {len(migrations)} or older",
            do="run the version of assay that wrote it, or pass another --data-dir",
        )
    for version, statements in enumerate(migrations[current:], start=current + 1):
        for statement in statements:
            connection.exec_driver_sql(statement)
        connection.exec_driver_sql("INSERT INTO migrations VALUES (?, ?)", (version, time.time()))
