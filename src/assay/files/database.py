"""A database: one SQLite file, and nothing acknowledged before it is on disk.

The service keeps its rounds in one, a receiver its callbacks, and a validator the ledger of its
nodes. This module is not imported with its package: it would make every command wait for
SQLAlchemy.
"""

import ctypes
import fcntl
import os
import sqlite3
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from assay.errors import StorageError

BUSY_TIMEOUT_MS = 5000
JOURNAL_TIMEOUT_MS = 250  # for which writers wait while the journal is emptied
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

SCHEMA = "SELECT type, name, tbl_name, sql FROM sqlite_master"
"""Query of everything that an SQLite file defines: what it is, its name, the table it belongs to,
and its text.
"""

_MIGRATIONS = "CREATE TABLE IF NOT EXISTS migrations (version INTEGER PRIMARY KEY, applied_at REAL)"
NETWORKS = {
    **dict.fromkeys((0x517B, 0xFF534D42, 0xFE534D42), "SMB"),
    0x6969: "NFS",
    0x01021997: "9P",
    0x65735546: "FUSE",
    0x00C36400: "Ceph",
    0x5346414F: "AFS",
    0x0BD00BD0: "Lustre",
}
"""File systems that other machines may hold, by their numbers in Linux' magic.h."""

LONGEST_VALUE = 2**26
"""Bytes of the longest text that is read from a file that is only read: 64 MiB."""


class Database:
    """Opens the file, brings its schema up to date, and hands out transactions.

    The file is readable by its owner only, in whatever directory it lies.

    Args:
        data_dir: Directory of the file. It is created if it does not exist.
        name: Name of the file.
        migrations: Steps that lead to the schema, the oldest first.
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
        _check_beside(self.path, flag)
        self._writing = threading.Lock()
        self._file = None if read_only else self._own(data_dir, exclusive=exclusive)
        if read_only:
            connect = partial(_connect_to_read, self.path)
            self._engine = sa.create_engine("sqlite://", creator=connect, poolclass=QueuePool)
        else:
            self._engine = sa.create_engine(f"sqlite:///{self.path}", pool_size=8, max_overflow=32)
            sa.event.listen(
                self._engine, "connect", partial(_on_connect, secure_delete=secure_delete)
            )
        sa.event.listen(self._engine, "begin", _on_begin)
        self._writer = self._engine.execution_options(assay_write=True)
        self._tables = sa.MetaData()
        try:
            if read_only:
                with self.read() as connection:
                    self._check_version(connection, len(migrations), oldest=len(migrations))
            else:
                with self.write() as connection:
                    self._migrate(connection, migrations)
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
        with _three_parts(self.path, self._flag), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Open a transaction that is on disk when the block ends, or has changed nothing."""
        self._check_place()
        # SQLite lets waiting writers poll; this lock is fair among the threads of this process.
        with _three_parts(self.path, self._flag), self._writing, self._writer.begin() as connection:
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
        """Move what the journal holds into the file and cut the journal to nothing; return False if
        a reader needs it.

        The journal keeps what was deleted until it is written over.
        """
        with (
            _three_parts(self.path, self._flag),
            self._writing,
            closing(self._engine.raw_connection()) as connection,
        ):
            cursor = connection.cursor()
            try:
                cursor.execute(f"PRAGMA busy_timeout={JOURNAL_TIMEOUT_MS}")
                cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                return bool(cursor.fetchall()[0][0] == 0)
            finally:
                cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
                cursor.close()

    def close(self) -> None:
        """Close every connection and give up the directory."""
        self._engine.dispose()
        if self._file is not None:
            # Only now: closing any descriptor of the file gives up the locks that SQLite holds on
            # it.
            os.close(self._file)
            self._file = None

    def _check_place(self) -> None:
        """Refuse to write to a file that was moved or deleted: SQLite would, and the next start
        would miss it all.
        """
        file = self._file  # another thread may close it meanwhile
        try:
            if file is None or os.path.samestat(os.fstat(file), self.path.stat()):
                return
            seen = "another file is in the place of the one that is open"
        except OSError as error:
            seen = error.strerror or str(error)
        wanted = "the file that was opened: what is written would be lost with it"
        do = "stop this process before a database is moved or restored, and start it again"
        raise StorageError(f"{self.path}: {seen}", wanted=wanted, do=do)

    def _own(self, data_dir: Path, *, exclusive: bool) -> int:
        """Create directory and file where they are missing, take the lock where it is wanted, and
        shut others out.

        SQLite gives its journal the permissions of the database.
        """
        refusal = partial(
            StorageError, do=f"stop another service that runs there, or pass another {self._flag}"
        )
        try:
            data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            if kind := NETWORKS.get(_file_system(data_dir)):
                wanted = (
                    "a disk of this machine: SQLite's journal is shared memory, which no network "
                    "keeps in step"
                )
                raise StorageError(
                    f"{data_dir} on {kind}", wanted=wanted, do=f"pass another {self._flag}"
                )
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise refusal(
                        f"{self.path} is a pipe or a device", wanted="a database, or no file yet"
                    )
                if exclusive:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for file in (
                    self.path,
                    *(self.path.with_name(f"{self.path.name}{end}") for end in ("-wal", "-shm")),
                ):
                    with suppress(
                        PermissionError, FileNotFoundError
                    ):  # of another user, or not there yet
                        file.chmod(0o600)
            except BaseException:
                os.close(descriptor)
                raise
        except BlockingIOError:
            wanted = "a data directory of its own for every service"
            raise refusal(f"another service runs in {data_dir}", wanted=wanted) from None
        except OSError as error:
            raise refusal(
                f"{self.path}: {error.strerror}", wanted="a directory that can be written"
            ) from None
        return descriptor

    def _migrate(self, connection: sa.Connection, migrations: Sequence[Sequence[str]]) -> None:
        connection.exec_driver_sql(_MIGRATIONS)
        current = self._check_version(connection, len(migrations))
        for version, statements in enumerate(migrations[current:], start=current + 1):
            for statement in statements:
                connection.exec_driver_sql(statement)
            connection.exec_driver_sql(
                "INSERT INTO migrations VALUES (?, ?)", (version, time.time())
            )

    def _check_version(self, connection: sa.Connection, newest: int, *, oldest: int = 0) -> int:
        if not any(
            row[:2] == ("table", "migrations") for row in connection.exec_driver_sql(SCHEMA)
        ):
            raise damaged(
                self.path, "the table migrations is missing", flag=self._flag
            )  # a view may have no end
        current = connection.exec_driver_sql(
            "SELECT coalesce(max(version), 0) FROM migrations"
        ).scalar_one()
        if type(current) is not int or not oldest <= current <= newest:
            wanted = f"schema {newest}" + (" or older" if oldest < newest else "")
            do = f"run the version of assay that wrote it, or pass another {self._flag}"
            raise StorageError(f"a database of schema {current!r:.40}", wanted=wanted, do=do)
        return current


def _file_system(path: Path) -> int:
    """Return the number by which Linux knows the file system of a directory (statfs); 0
    elsewhere.
    """
    found = ctypes.create_string_buffer(256)
    if sys.platform != "linux" or ctypes.CDLL(None).statfs(os.fsencode(path), found):
        return 0
    return int.from_bytes(found.raw[:4], sys.byteorder)


def _check_beside(path: Path, flag: str) -> None:
    """Refuse what is no file in the place of a journal of SQLite, which would wait in a pipe for
    ever.
    """
    for beside in (path.with_name(f"{path.name}{end}") for end in ("-journal", "-wal", "-shm")):
        if beside.exists() and not beside.is_file():
            do = f"remove it, or pass another {flag}"
            raise StorageError(
                f"{beside} is no file", wanted="a journal of SQLite, or nothing there", do=do
            )


def damaged(path: Path, reason: str, *, flag: str = "--data-dir") -> StorageError:
    """Return the error of a file that holds something other than what this version writes."""
    do = f"restore it from a backup, or pass another {flag}"
    return StorageError(f"{path}: {reason}", wanted="a database that assay wrote", do=do)


def tables(path: Path, *, flag: str = "--data-dir") -> set[str]:
    """Return the names of the tables of an SQLite file, which stays as it is; none of an empty
    file.
    """
    _check_beside(path, flag)
    with _three_parts(path, flag), closing(_connect_to_read(path)) as connection:
        return {str(name) for kind, name, *_ in connection.execute(SCHEMA) if kind == "table"}


def schema_changes(
    found: Iterable[Sequence[Any]], migrations: tuple[tuple[str, ...], ...]
) -> list[str]:
    """Compare rows of :data:`SCHEMA` with what all migrations make, to the letter.

    Nothing is left out by its name: what SQLite itself makes for the migrations is wanted, and all
    else is named.

    Returns:
        The tables, indexes, triggers and views that are missing, changed or added, in words.
    """
    wanted = _wanted(migrations)
    there = Counter(tuple(row) for row in found)
    missing, added = ([row[:2] for row in rows] for rows in (wanted - there, there - wanted))
    words = {one: "missing" if one not in added else "changed" for one in missing}
    words |= {one: "not one that assay made" for one in added if one not in missing}
    return [f"the {kind!s:.20} {name!s:.80} is {word}" for (kind, name), word in words.items()]


@cache
def _wanted(migrations: tuple[tuple[str, ...], ...]) -> Counter[tuple[Any, ...]]:
    with closing(sqlite3.connect(":memory:")) as made:
        for statement in (_MIGRATIONS, *(statement for step in migrations for statement in step)):
            made.execute(statement)
        return Counter(made.execute(SCHEMA).fetchall())


def _connect_to_read(path: Path) -> sqlite3.Connection:
    uri = f"file:{quote(str(path.resolve()))}?mode=ro"
    if not os.access(path.parent, os.W_OK) and not path.with_name(f"{path.name}-wal").exists():
        # no writer has it open, and the journal that SQLite would begin has no place
        uri += "&immutable=1"
    connection = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_VALUE)
    # A text is read whatever its bytes are: a reader that does not trust a file compares hashes.
    connection.text_factory = partial(str, encoding="utf-8", errors="replace")
    _set_up(connection, f"busy_timeout={BUSY_TIMEOUT_MS}", "trusted_schema=OFF", "query_only=ON")
    return connection


def _set_up(connection: Any, *pragmas: str) -> None:
    """Set pragmas of a new connection, and close it where that fails: nothing else would."""
    try:
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}").close()
    except BaseException:
        connection.close()
        raise


@contextmanager
def _three_parts(path: Path, flag: str) -> Iterator[None]:
    try:
        yield
    except (sa.exc.OperationalError, sa.exc.TimeoutError, sqlite3.OperationalError) as error:
        # The last kind comes from the pragmas of a new connection, where nothing wraps it.
        reason = getattr(error, "orig", None) or error
        if (
            getattr(reason, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR
        ):  # a table or column is missing
            raise damaged(path, str(reason), flag=flag) from error
        wanted, do = _ADVICE.get(getattr(reason, "sqlite_errorcode", 0) & 0xFF, _NO_ROOM)
        raise StorageError(f"{path}: {reason}", wanted=wanted, do=do.format(flag=flag)) from error
    except (
        sa.exc.DatabaseError,
        sqlite3.DatabaseError,
        UnicodeDecodeError,
    ) as error:  # the last: of a message
        if isinstance(error, sa.exc.IntegrityError):
            raise
        raise damaged(path, str(getattr(error, "orig", error)), flag=flag) from error


def _on_connect(connection: Any, record: ConnectionPoolEntry, *, secure_delete: bool) -> None:
    # The driver must not open transactions by itself: see _on_begin.
    connection.isolation_level = None
    more = (
        "synchronous=FULL",
        "foreign_keys=ON",
        "journal_size_limit=8388608",
        f"secure_delete={int(secure_delete)}",
    )
    # The file keeps its journal mode; a transaction could not set it.
    _set_up(connection, f"busy_timeout={BUSY_TIMEOUT_MS}", "journal_mode=WAL", *more)


def _on_begin(connection: sa.Connection) -> None:
    # A deferred transaction that starts to write fails at once where another has written meanwhile.
    write = connection.get_execution_options().get("assay_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
