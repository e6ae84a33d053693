"""The database of the service: the schema of its tables, unless another one is named."""

from collections.abc import Sequence
from pathlib import Path

import assay.reports.database
from assay.poc.service.store._schema import MIGRATIONS

FILE = "service.sqlite3"


class Database(assay.reports.database.Database):
    """Opens the file of a service; :class:`assay.reports.database.Database` says how.

    Args:
        data_dir: Directory of the file. It is created if it does not exist.
        exclusive: Whether this process is the only service that may open the file.
        name: Name of the file.
        migrations: Steps that lead to the schema, the oldest first.
        flag: Flag that names the file, for errors.

    Raises:
        StorageError: Another service has the file, it cannot be written, or a newer version wrote it.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        exclusive: bool = True,
        name: str = FILE,
        migrations: Sequence[Sequence[str]] = MIGRATIONS,
        flag: str = "--data-dir",
    ) -> None:
        super().__init__(data_dir, name=name, migrations=migrations, exclusive=exclusive, secure_delete=True, flag=flag)
