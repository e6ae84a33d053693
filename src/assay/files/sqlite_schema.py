"""The schema of an SQLite file: its migrations, and how it differs from what they make."""

import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from assay.errors import StorageError
from assay.files.sqlite_connections import check_journals, connect_to_read, damaged, storage_errors

SCHEMA = "SELECT type, name, tbl_name, sql FROM sqlite_master"
"""Query of the tables, indexes, triggers and views of a file.

A row is the kind of an object, its name, the table that it belongs to, and its SQL text.
"""

# SQLite keeps the text of a table, so it is part of the format of a file.
_CREATE_MIGRATIONS = (
    "CREATE TABLE IF NOT EXISTS migrations (version INTEGER PRIMARY KEY, applied_at REAL)"
)
_migrations = sa.table("migrations", sa.column("version"), sa.column("applied_at"))


def migrate(
    connection: sa.Connection, migrations: Sequence[Sequence[str]], *, path: Path, flag: str
) -> None:
    """Run the migrations that a file has not had yet; a newer file is a StorageError."""
    connection.exec_driver_sql(_CREATE_MIGRATIONS)
    current = check_version(connection, newest=len(migrations), path=path, flag=flag)
    for version, statements in enumerate(migrations[current:], start=current + 1):
        for statement in statements:
            connection.exec_driver_sql(statement)
        connection.execute(_migrations.insert().values(version=version, applied_at=time.time()))


def check_version(
    connection: sa.Connection, *, newest: int, oldest: int = 0, path: Path, flag: str
) -> int:
    """Return how many migrations a file has had; a number out of range is a StorageError."""
    # A view of this name in another's file may never end.
    if not any(row[:2] == ("table", "migrations") for row in connection.exec_driver_sql(SCHEMA)):
        raise damaged(path, "the table migrations is missing", flag=flag)
    newest_applied = sa.func.coalesce(sa.func.max(_migrations.c.version), 0)
    current = connection.execute(sa.select(newest_applied)).scalar_one()
    if type(current) is not int or not oldest <= current <= newest:
        raise StorageError(
            f"a database of schema {current!r:.40}",
            wanted=f"schema {newest}" + (" or older" if oldest < newest else ""),
            do=f"run the version of assay that wrote it, or pass another {flag}",
        )
    return current


def table_names(path: Path, *, flag: str = "--data-dir") -> set[str]:
    """Return the names of the tables of an SQLite file, which stays as it is."""
    check_journals(path, flag)
    with storage_errors(path, flag), closing(connect_to_read(path)) as connection:
        return {str(name) for kind, name, *_ in connection.execute(SCHEMA) if kind == "table"}


def schema_changes(
    rows: Iterable[Sequence[Any]], migrations: tuple[tuple[str, ...], ...]
) -> list[str]:
    """Compare rows of :data:`SCHEMA` with those of a file that all migrations made.

    The SQL text of every object is compared, those that SQLite itself adds included; only where its
    lines break does not matter, for releases broke them in different places.

    Returns:
        The tables, indexes, triggers and views that are missing, changed or added, in words.
    """
    expected = _rows_after(migrations)
    actual = Counter(map(_on_one_line, rows))
    missing = [row[:2] for row in expected - actual]
    changes = dict.fromkeys(missing, "missing") | {
        row[:2]: "changed" if row[:2] in missing else "not one that assay made"
        for row in actual - expected
    }
    return [
        f"the {kind!s:.20} {name!s:.80} is {change}" for (kind, name), change in changes.items()
    ]


@cache
def _rows_after(migrations: tuple[tuple[str, ...], ...]) -> Counter[tuple[Any, ...]]:
    """Return the rows of :data:`SCHEMA` of a new file after all migrations."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute(_CREATE_MIGRATIONS)
        for statements in migrations:
            for statement in statements:
                connection.execute(statement)
        return Counter(map(_on_one_line, connection.execute(SCHEMA)))


def _on_one_line(row: Sequence[Any]) -> tuple[Any, ...]:
    """Return a row of :data:`SCHEMA` with one space in place of every break."""
    return tuple(" ".join(value.split()) if isinstance(value, str) else value for value in row)
