"""A database: one SQLite file, and nothing acknowledged before it is on disk.

The service keeps its rounds in one, a receiver its callbacks, and a validator the ledger of its
nodes. This module is not imported with its package: it would make every command wait for
SQLAlchemy.
"""

import ctypes
import fcntl
import os
import stat
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from assay.errors import StorageError
from assay.files.sqlite_connections import (
    BUSY_TIMEOUT_MS,
    check_journals,
    damaged,
    reading_engine,
    storage_errors,
    writing_engine,
)
from assay.files.sqlite_schema import check_version, migrate

CHECKPOINT_TIMEOUT_MS = 250  # for which writers wait while the journal is emptied
LARGEST_STEP = 60.0  # seconds by which a clock may be set and count as one that was not
STEADY = 86_400.0  # seconds without such a step, after which the clock is believed

NETWORK_FILE_SYSTEMS = {
    0x517B: "SMB",
    0xFF534D42: "SMB",
    0xFE534D42: "SMB",
    0x6969: "NFS",
    0x01021997: "9P",
    0x65735546: "FUSE",
    0x00C36400: "Ceph",
    0x5346414F: "AFS",
    0x0BD00BD0: "Lustre",
}
"""File systems that other machines may share, by their numbers in Linux' magic.h."""


class Database:
    """Opens the file, brings its schema up to date, and hands out transactions.

    The file is readable by its owner only, in whatever directory it lies.

    Args:
        data_dir: Directory of the file. It is created if it does not exist.
        name: Name of the file.
        migrations: SQL statements of every migration, the oldest first.
        exclusive: Whether this process is the only one that may open the file in this way. A
            service does; the command line opens the file beside a running service.
        read_only: Whether the file belongs to another process or person: it must exist, is not
            changed, and its tables are not looked at.
        secure_delete: Whether what is deleted is overwritten in the file.
        flag: Flag that names another place, for errors.

    Raises:
        StorageError: Another service has the file, it cannot be read or written, or a newer version
            wrote it.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        name: str,
        migrations: Sequence[Sequence[str]],
        exclusive: bool = True,
        read_only: bool = False,
        secure_delete: bool = False,
        flag: str = "--data-dir",
    ) -> None:
        self.path = data_dir / name
        self._flag = flag
        check_journals(self.path, flag)
        self._writing = threading.Lock()
        self._tables = sa.MetaData()
        self._descriptor: int | None = None
        self._opened_at = time.monotonic()
        self._settled_at = time.time()
        self._steady_since = self._opened_at
        self._clock_offset = self._settled_at - self._opened_at
        if read_only:
            self._engine = reading_engine(self.path)
        else:
            self._descriptor = self._claim(data_dir, exclusive=exclusive)
            self._settled_at = min(time.time(), self._last_written())
            self._engine = writing_engine(self.path, secure_delete=secure_delete)
        self._writer = self._engine.execution_options(assay_write=True)
        newest = len(migrations)
        try:
            if read_only:
                with self.read() as connection:
                    check_version(
                        connection, newest=newest, oldest=newest, path=self.path, flag=flag
                    )
            else:
                with self.write() as connection:
                    migrate(connection, migrations, path=self.path, flag=flag)
                with self.read() as connection:
                    self._tables.reflect(connection)
        except BaseException:
            self.close()
            raise

    def __getitem__(self, table: str) -> sa.Table:
        if table not in self._tables.tables:
            raise damaged(self.path, f"the table {table} is missing", flag=self._flag)
        return self._tables.tables[table]

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Open a transaction that sees one consistent state and does not wait for writers."""
        with storage_errors(self.path, self._flag), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Open a transaction that is on disk when the block ends, or has changed nothing."""
        self._check_identity()
        # SQLite lets waiting writers poll; this lock is fair among the threads of this process.
        with (
            storage_errors(self.path, self._flag),
            self._writing,
            self._writer.begin() as connection,
        ):
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

    def empty_journal(self) -> bool:
        """Move the journal into the file and truncate it; return False if a reader needs it.

        The journal keeps what was deleted until it is written over.
        """
        with (
            storage_errors(self.path, self._flag),
            self._writing,
            closing(self._engine.raw_connection()) as connection,
        ):
            cursor = connection.cursor()
            try:
                cursor.execute(f"PRAGMA busy_timeout={CHECKPOINT_TIMEOUT_MS}")
                cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                return bool(cursor.fetchall()[0][0] == 0)  # 1 where a reader blocks it
            finally:
                cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
                cursor.close()

    def settled_time(self) -> float:
        """Return the time that ages count from: the last write before opening, plus the time since.

        A clock that is far ahead makes nothing old for a day, whether it jumps or was wrong at the
        start; a backup that was restored with its old times delays deletion by a day at most.
        """
        now = time.time()
        passed = time.monotonic()
        if abs(now - passed - self._clock_offset) > LARGEST_STEP:
            self._clock_offset = now - passed
            self._steady_since = passed
        if passed - self._steady_since >= STEADY:
            return now
        return min(now, self._settled_at + passed - self._opened_at)

    def _last_written(self) -> float:
        written = [self.path.stat().st_mtime]
        with suppress(FileNotFoundError):
            written.append(self.path.with_name(f"{self.path.name}-wal").stat().st_mtime)
        return max(written)

    def close(self) -> None:
        """Close every connection and release the lock of the file."""
        self._engine.dispose()
        if self._descriptor is not None:
            # Only now: closing any descriptor of the file drops the locks that SQLite has on it.
            os.close(self._descriptor)
            self._descriptor = None

    def _check_identity(self) -> None:
        """Refuse to write where the file was moved or deleted: the next start would miss it all."""
        # Another thread may close it meanwhile.
        descriptor = self._descriptor
        try:
            if descriptor is None or os.path.samestat(os.fstat(descriptor), self.path.stat()):
                return
            reason = "another file is in the place of the one that is open"
        except OSError as error:
            reason = error.strerror or str(error)
        raise StorageError(
            f"{self.path}: {reason}",
            wanted="the file that was opened: what is written would be lost with it",
            do="stop this process before a database is moved or restored, and start it again",
        )

    def _claim(self, data_dir: Path, *, exclusive: bool) -> int:
        """Create the directory and the file, lock it if ``exclusive``, and keep other users out."""
        do = f"stop another service that runs there, or pass another {self._flag}"
        try:
            data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            if network := NETWORK_FILE_SYSTEMS.get(file_system(data_dir)):
                raise StorageError(
                    f"{data_dir} on {network}",
                    wanted="a disk of this machine: SQLite's journal is shared memory, which no "
                    "network keeps in step",
                    do=f"pass another {self._flag}",
                )
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise StorageError(
                        f"{self.path} is a pipe or a device",
                        wanted="a database, or no file yet",
                        do=do,
                    )
                if exclusive:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # SQLite gives a new journal the permissions of the database.
                for end in ("", "-wal", "-shm"):
                    # A file of another user, or one that does not exist yet, stays as it is.
                    with suppress(PermissionError, FileNotFoundError):
                        self.path.with_name(f"{self.path.name}{end}").chmod(0o600)
            except BaseException:
                os.close(descriptor)
                raise
        except BlockingIOError:
            raise StorageError(
                f"another service runs in {data_dir}",
                wanted="a data directory of its own for every service",
                do=do,
            ) from None
        except OSError as error:
            raise StorageError(
                f"{self.path}: {error.strerror}", wanted="a directory that can be written", do=do
            ) from None
        return descriptor


def file_system(path: Path) -> int:
    """Return the number by which Linux knows the file system of a directory; 0 elsewhere."""
    # Longer than the struct of statfs(2)
    statfs = ctypes.create_string_buffer(256)
    if sys.platform != "linux" or ctypes.CDLL(None).statfs(os.fsencode(path), statfs):
        return 0
    return int.from_bytes(statfs.raw[:4], sys.byteorder)
