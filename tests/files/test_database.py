"""Databases: what opening one costs once and not again."""

import pytest
import sqlalchemy as sa

from assay.errors import StorageError
from assay.files import database as _database
from assay.files.database import Database

CREATED = ["CREATE TABLE kept (name TEXT)"]
WIDER = ["ALTER TABLE kept ADD COLUMN size INTEGER"]


def opened(folder, *migrations):
    return Database(folder, name="kept.sqlite3", migrations=migrations)


def test_files_of_one_schema_share_their_tables(tmp_path, monkeypatch):
    first = opened(tmp_path / "first", CREATED)
    reads: list[object] = []
    monkeypatch.setattr(sa.MetaData, "reflect", lambda *_, **__: reads.append(1))
    second = opened(tmp_path / "second", CREATED)
    assert reads == []
    second.change(second["kept"].insert().values(name="a"))
    assert (first.rows(first["kept"].select()), second.rows(second["kept"].select())) == ([], [("a",)])
    first.close()
    second.close()


def test_another_schema_has_tables_of_its_own(tmp_path):
    names = []
    for migrations in ([CREATED], [CREATED, WIDER]):
        database = opened(tmp_path, *migrations)
        names.append(database["kept"].columns.keys())
        database.close()
    assert names == [["name"], ["name", "size"]]


def test_a_directory_on_a_network_is_refused_before_a_file_is_made(tmp_path, monkeypatch):
    """The journal is shared memory, which no network keeps in step: a client that is killed may leave no database."""
    assert _database._file_system(tmp_path) not in (0, *_database.NETWORKS)
    monkeypatch.setattr(_database, "_file_system", lambda path: 0x6969)
    with pytest.raises(StorageError, match=r"on NFS\n.*a disk of this machine"):
        Database(tmp_path / "data", name="d.sqlite3", migrations=())
    assert not (tmp_path / "data" / "d.sqlite3").exists()
