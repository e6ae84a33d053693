"""Databases: what opening one costs once and not again."""

import sqlalchemy as sa

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
