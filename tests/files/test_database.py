"""Where a database may be kept."""

import pytest

from assay.errors import StorageError
from assay.files import database as _database
from assay.files.database import Database


def test_a_directory_on_a_network_is_refused_before_a_file_is_made(tmp_path, monkeypatch):
    """The journal is shared memory, which no network keeps in step: a client that is killed may
    leave no database.
    """
    assert _database._file_system(tmp_path) not in (0, *_database.NETWORKS)
    monkeypatch.setattr(_database, "_file_system", lambda path: 0x6969)
    with pytest.raises(StorageError, match=r"on NFS\n.*a disk of this machine"):
        Database(tmp_path / "data", name="d.sqlite3", migrations=())
    assert not (tmp_path / "data" / "d.sqlite3").exists()
