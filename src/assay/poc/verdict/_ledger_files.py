"""Ledgers as files of other validators: read without a change, exported as JSON Lines, and read back from those.

An export begins with the beginning of the ledger and ends with its head. Between them stand the entries, byte for byte,
and before the first entry that was judged under a law, that law::

    {"kind":"assay.poc.ledger","version":1,"id":"…","created":1.8e9,"alpha":0.001,"beta":0.01}
    {"law":{…}}
    {"seq":1,"previous":"…",…}
    {"head":{"count":1,"hash":"…"}}
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import sqlalchemy as sa

from assay.errors import DataError
from assay.poc.verdict._ledger_audit import AT_ONCE, Fault, LedgerAudit, audit_database, check_head, text_of
from assay.poc.verdict._ledger_entries import Entry, Genesis, sha256
from assay.poc.verdict._ledger_schema import ACCOUNTS, LAWS, LEDGER, MIGRATIONS, TABLES, UPDATES, number_of
from assay.reports import PartialFile, dumps, loads, read_lines
from assay.reports.database import Database, tables

MAGIC = b"SQLite format 3\0"
_DO = "ask for the file again, or write one with `assay poc ledger export`"


@dataclass(frozen=True)
class Source:
    """A ledger to read: its own file, or an export in a database that is thrown away.

    Args:
        path: File that was named.
        database: Database with the tables of the ledger.
        stated: Head that an export ends with; None for a ledger, whose head is in the database.
    """

    path: Path
    database: Database
    stated: tuple[int, str] | None

    def audit(self, head: str | None = None) -> LedgerAudit:
        """Audit it.

        Args:
            head: Hash that was published, and must be in the chain.
        """
        found = audit_database(self.database, head=head, whole=self.stated is None)
        if self.stated is None or self.stated == (found.entries, found.head) or found.faults:
            return found
        reason = f"not there, or changed: the head names {self.stated[0]!s:.20} entries and {self.stated[1]:.80}"
        return replace(found, faults=(Fault(entry=found.entries + 1, reason=reason),))


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Open a ledger or an export of one to read; the file stays as it is.

    Raises:
        DataError: It is neither; names the line.
        StorageError: It cannot be read.
    """
    _, start = next(read_lines(path), (1, b""))
    with tempfile.TemporaryDirectory(prefix="assay-ledger-") as folder:
        if start.startswith(MAGIC):
            if LEDGER.name not in tables(path, flag="ledger"):
                raise _bad(str(path), "a database without a ledger")
            database, stated = _open(path.parent, path.name, read_only=True), None
        else:
            database = _open(Path(folder), "copy.sqlite3", read_only=False)
            stated = _read_export(path, database)
        try:
            yield Source(path, database, stated)
        finally:
            database.close()


def audit_ledger(path: str | Path, *, head: str | None = None) -> LedgerAudit:
    """Audit a ledger or an export of one, which stays as it is: every hash, every place and every verdict.

    Args:
        path: File of the ledger, or export.
        head: Hash of the head that was published once; entries up to it must still be there.

    Raises:
        UsageError: The head cannot be one.
        DataError: The file is neither.
        StorageError: The file cannot be read.
    """
    check_head(head)
    with open_source(Path(path)) as source:
        return source.audit(head)


def export_ledger(database: Database, path: Path, *, overwrite: bool = False) -> tuple[int, str]:
    """Write a ledger as JSON Lines, with everything that an audit elsewhere needs; return its head.

    Raises:
        UsageError: The file exists and ``overwrite`` is not set.
        StorageError: The file cannot be written.
    """
    with PartialFile(path, overwrite=overwrite) as out, database.read() as connection:
        out.restart()
        genesis, count, hash = connection.execute(sa.select(LEDGER.c.genesis, LEDGER.c.count, LEDGER.c.hash)).one()
        out.append_lines([text_of(genesis)])
        known = set[str]()
        query = sa.select(UPDATES.c.law, UPDATES.c.entry).order_by(UPDATES.c.seq)
        for rows in connection.execute(query, execution_options={"yield_per": AT_ONCE}).partitions():
            lines = []
            for law, entry in rows:
                if law not in known:
                    known.add(law)
                    text = text_of(connection.execute(sa.select(LAWS.c.law).where(LAWS.c.hash == law)).scalar())
                    lines.append(_law_line(text))
                lines.append(text_of(entry))
            out.append_lines(lines)
        out.append({"head": {"count": count, "hash": hash}})
        out.commit()
    return int(count), str(hash)


def _open(folder: Path, name: str, *, read_only: bool) -> Database:
    steps = MIGRATIONS if read_only else TABLES
    return Database(folder, name=name, migrations=steps, exclusive=False, read_only=read_only, flag="ledger")


def _read_export(path: Path, database: Database) -> tuple[int, str]:
    """Fill empty tables with the lines of an export, in their order; return the head that it ends with."""
    lines = read_lines(path)
    number, line = next(lines, (1, b""))
    genesis = Genesis.parse(_text(line, path, number), f"{path}, line {number}")
    seq, hash, stated = 0, genesis.hash, None
    with database.write() as connection:
        for number, line in lines:
            source, text = f"{path}, line {number}", _text(line, path, number)
            if stated is not None:
                raise _bad(source, "a line after the head")
            if text.startswith('{"law":'):
                law = dumps(loads(text, source)["law"])
                if text != _law_line(law):
                    raise _bad(source, "a law that is not in the form in which it is written")
                connection.execute(LAWS.insert().prefix_with("OR IGNORE").values(hash=sha256(law), law=law))
            elif text.startswith('{"head":'):
                stated = _head(text, source)
            else:
                entry = Entry.parse(text, source)
                seq, hash = seq + 1, sha256(text)
                _insert(connection, seq, entry, text, hash, source)
        connection.execute(LEDGER.insert().values(id=1, genesis=genesis.line, count=seq, hash=hash))
    if stated is None:
        raise _bad(f"{path}, line {number}", "the end of the file, where its head should be")
    return stated


def _insert(connection: sa.Connection, seq: int, entry: Entry, text: str, hash: str, source: str) -> None:
    connection.execute(ACCOUNTS.insert().prefix_with("OR IGNORE").values(**vars(entry.owner)))
    account = connection.execute(number_of(entry.owner)).scalar_one()
    columns = {"seq": seq, "account": account, "round": entry.round, "name": entry.name, "law": entry.law}
    try:
        connection.execute(UPDATES.insert().values(columns | {"entry": text, "hash": hash}))
    except sa.exc.IntegrityError as error:
        raise _bad(source, f"a law that no line before it gives, or a name given twice ({error.orig})") from None


def _head(text: str, source: str) -> tuple[int, str]:
    head = loads(text, source)["head"]
    well_formed = isinstance(head, dict) and head.keys() == {"count", "hash"}
    if not well_formed or type(head["count"]) is not int or not isinstance(head["hash"], str):
        raise _bad(source, "a head without a count and a hash")
    return head["count"], head["hash"]


def _law_line(law: str) -> str:
    return f'{{"law":{law}}}'


def _text(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode().removesuffix("\n")
    except UnicodeDecodeError:
        raise _bad(f"{path}, line {number}", "bytes that are not UTF-8") from None


def _bad(source: str, reason: str) -> DataError:
    return DataError(f"{source}: {reason}", wanted="a ledger, or an export of one", do=_DO)
