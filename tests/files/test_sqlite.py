"""A database: the file of its name and no other, on a local disk."""

import os
import sqlite3
import stat
import time
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from assay.errors import StorageError
from assay.files import sqlite
from assay.files.sqlite import Database
from assay.files.sqlite_connections import connect_to_read
from assay.files.sqlite_schema import table_names

MIGRATIONS = (("CREATE TABLE notes (text TEXT)",),)
CHARACTERS = st.sampled_from("?#%&=:;+@ 'aé漢\N{COMBINING ACUTE ACCENT}") | st.characters(
    exclude_characters="/\0", exclude_categories=["Cs"]
)
NAMES = st.text(CHARACTERS, min_size=1, max_size=20).filter(lambda name: name not in (".", ".."))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(folder=NAMES, name=NAMES)
def test_the_file_of_its_path_is_written_and_no_other(tmp_path_factory, folder, name):
    root = tmp_path_factory.mktemp("databases")
    data_dir = root / folder
    database = Database(data_dir, name=name, migrations=MIGRATIONS)
    try:
        database.change(sa.insert(database["notes"]).values(text="a note"))
        beside = {path.name for path in data_dir.iterdir()}
        modes = {stat.S_IMODE(path.stat().st_mode) for path in data_dir.iterdir()}
    finally:
        database.close()
    assert [path.name for path in root.iterdir()] == [folder]
    assert beside == {name, f"{name}-wal", f"{name}-shm"}
    assert modes == {0o600}
    assert table_names(data_dir / name) == {"migrations", "notes"}
    reader = Database(data_dir, name=name, migrations=MIGRATIONS, read_only=True)
    with reader.read() as connection:
        assert connection.execute(sa.text("SELECT text FROM notes")).scalar_one() == "a note"
    reader.close()


def test_two_services_of_names_that_share_a_beginning_have_files_of_their_own(tmp_path):
    first = Database(tmp_path, name="rounds?1", migrations=MIGRATIONS)
    second = Database(tmp_path, name="rounds?2", migrations=MIGRATIONS)
    with pytest.raises(StorageError):
        Database(tmp_path, name="rounds?1", migrations=MIGRATIONS)
    first.change(sa.insert(first["notes"]).values(text="first"))
    assert second.scalar(sa.select(second["notes"])) is None
    first.close()
    second.close()


@pytest.mark.parametrize("name", [":memory:", "file:x?mode=memory", "a\udcff", "a\nb", " ", "~"])
def test_a_name_in_the_working_directory_is_that_of_a_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    database = Database(Path(), name=name, migrations=MIGRATIONS)
    database.change(sa.insert(database["notes"]).values(text="a note"))
    database.close()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    reader = Database(Path(), name=name, migrations=MIGRATIONS, read_only=True)
    assert table_names(tmp_path / name) == {"migrations", "notes"}
    with reader.read() as connection:
        assert connection.execute(sa.text("SELECT text FROM notes")).scalar_one() == "a note"
    reader.close()


def test_a_link_in_a_directory_that_cannot_be_written_shows_what_a_writer_just_wrote(
    tmp_path, monkeypatch
):
    """Its journal lies beside the file, and not beside the link."""
    database = Database(tmp_path / "data", name="notes.sqlite3", migrations=MIGRATIONS)
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "notes.sqlite3"
    link.symlink_to(database.path)
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != link.parent)
    with closing(database), closing(connect_to_read(link)) as connection:
        assert connection.execute("SELECT count(*) FROM migrations").fetchone() == (1,)


def test_a_link_that_leads_to_itself_is_refused(tmp_path):
    (tmp_path / "d.sqlite3").symlink_to("d.sqlite3")
    with pytest.raises(StorageError):
        Database(tmp_path, name="d.sqlite3", migrations=MIGRATIONS)


def test_a_directory_on_a_network_is_refused_before_a_file_is_made(tmp_path, monkeypatch):
    """The journal is shared memory, which no network keeps in step: a client that is killed may
    leave no database.
    """
    assert sqlite.file_system(tmp_path) not in (0, *sqlite.NETWORK_FILE_SYSTEMS)
    monkeypatch.setattr(sqlite, "file_system", lambda path: 0x6969)
    with pytest.raises(StorageError) as refusal:
        Database(tmp_path / "data", name="d.sqlite3", migrations=())
    assert "NFS" in refusal.value.seen
    assert not (tmp_path / "data" / "d.sqlite3").exists()


def test_a_schema_of_a_later_version_is_refused(tmp_path):
    later = (*MIGRATIONS, ("CREATE TABLE later (text TEXT)",))
    Database(tmp_path, name="d.sqlite3", migrations=later).close()
    with pytest.raises(StorageError):
        Database(tmp_path, name="d.sqlite3", migrations=MIGRATIONS)
    Database(tmp_path, name="d.sqlite3", migrations=later).close()


@pytest.mark.parametrize("version", [-1, 2, "one", 1.5])
def test_a_file_that_states_an_impossible_version_is_refused(tmp_path, version):
    Database(tmp_path, name="d.sqlite3", migrations=MIGRATIONS).close()
    with sqlite3.connect(tmp_path / "d.sqlite3") as connection:
        connection.execute("DROP TABLE migrations")
        connection.execute("CREATE TABLE migrations (version, applied_at REAL)")
        connection.execute("INSERT INTO migrations VALUES (?, 0)", (version,))
    connection.close()
    for read_only in (False, True):
        with pytest.raises(StorageError):
            Database(tmp_path, name="d.sqlite3", migrations=MIGRATIONS, read_only=read_only)


@pytest.mark.parametrize("years", [-5, 0, 5])
def test_a_clock_that_is_wrong_at_the_start_makes_nothing_old(tmp_path, monkeypatch, years):
    database = Database(tmp_path, name="d.sqlite3", migrations=MIGRATIONS)
    database.change(sa.insert(database["notes"]).values(text="a note"))
    written_at = time.time()
    database.close()
    ahead = years * 365 * 86_400.0
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + ahead)
    again = Database(tmp_path, name="d.sqlite3", migrations=MIGRATIONS)
    assert again.settled_time() < written_at + 60
    again.close()
    # A file that was not opened for years is no older than at its last write.
    monkeypatch.undo()
    os.utime(tmp_path / "d.sqlite3", (written_at - 1e8, written_at - 1e8))
    later = Database(tmp_path, name="d.sqlite3", migrations=MIGRATIONS)
    assert abs(later.settled_time() - (written_at - 1e8)) < 60
    later.close()


@pytest.mark.parametrize("step", [0.0, 3600.0])
def test_a_backup_with_old_times_delays_deletion_by_a_day_and_a_step_of_the_clock(
    tmp_path, monkeypatch, step
):
    Database(tmp_path, name="d.sqlite3", migrations=MIGRATIONS).close()
    now = time.time
    uptime = time.monotonic
    year_ago = now() - 365 * 86_400
    for path in tmp_path.iterdir():
        os.utime(path, (year_ago, year_ago))
    database = Database(tmp_path, name="d.sqlite3", migrations=MIGRATIONS)
    passed = 0.0
    added = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: uptime() + passed)
    monkeypatch.setattr(time, "time", lambda: now() + passed + added)
    delays = []
    for hour in range(60):
        passed = hour * 3600.0
        added = step if hour >= 12 else 0.0
        delays.append(time.time() - database.settled_time())
    database.close()
    steady_from = 24 if step == 0 else 12 + 24
    assert all(delay > 300 * 86_400 for delay in delays[:steady_from])
    assert all(delay < 60 for delay in delays[steady_from:])
