"""Exports of a ledger as JSON Lines: genesis, each law before its first use, entries, head."""

from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path

import sqlalchemy as sa

from assay.errors import DataError
from assay.files.jsonl import dumps, read_lines
from assay.files.sqlite import Database
from assay.poc.verdict.entries import Entry, Genesis
from assay.poc.verdict.ledger_tables import (
    AT_ONCE,
    LAWS,
    LEDGER,
    UPDATES,
    insert_account,
    insert_entry,
    insert_genesis,
    insert_law,
    text_of,
)


def export_lines(connection: sa.Connection) -> Iterator[str]:
    """Yield the lines of an export."""
    genesis, count, hash = connection.execute(
        sa.select(LEDGER.c.genesis, LEDGER.c.count, LEDGER.c.hash)
    ).one()
    yield text_of(genesis)
    query = sa.select(UPDATES.c.law, UPDATES.c.entry, LAWS.c.law.label("text"))
    written = set[str]()
    query = query.select_from(UPDATES.outerjoin(LAWS, LAWS.c.hash == UPDATES.c.law)).order_by(
        UPDATES.c.seq
    )
    for law, entry, text in connection.execute(query, execution_options={"yield_per": AT_ONCE}):
        if law not in written:
            yield f'{{"law":{text_of(text)}}}'
        written.add(law)
        yield text_of(entry)
    yield head_line(count, hash)


def head_line(count: int, hash: str) -> str:
    """Return the last line of an export."""
    return dumps({"head": {"count": count, "hash": hash}})


def read_export(path: Path, database: Database) -> str:
    """Fill an empty ledger from a canonical export; return its last line, the head."""
    first, *_ = next(_lines_of(path), ("", ""))
    with database.write() as connection:
        insert_genesis(connection, Genesis.parse(first, f"{path}, line 1"))
        for text, source in islice(_lines_of(path), 1, None):
            if text.startswith('{"law":'):
                insert_law(connection, text[7:-1])
            elif not text.startswith('{"head":'):
                entry = Entry.parse(text, source)
                try:
                    insert_entry(connection, insert_account(connection, entry.account), entry, text)
                except sa.exc.IntegrityError as error:
                    raise not_an_export(
                        source,
                        f"a law that no line before it gives, or a name given twice ({error.orig})",
                    ) from None
        # The copy is written out again: what is not an export line for line is refused.
        for read_line, wanted in zip_longest(_lines_of(path), export_lines(connection)):
            text, source = read_line or ("", f"{path}, the end")
            if text != wanted and not (
                wanted and text.startswith(start := '{"head":') and wanted.startswith(start)
            ):
                raise not_an_export(
                    source,
                    f"not the line that an export of these entries has there, {wanted!s:.80}",
                )
    return text


def _lines_of(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the lines of a file, each with its place."""
    for number, line in read_lines(path):
        try:
            yield line.decode().removesuffix("\n"), f"{path}, line {number}"
        except UnicodeDecodeError:
            raise not_an_export(f"{path}, line {number}", "bytes that are not UTF-8") from None


def not_an_export(source: str, reason: str) -> DataError:
    """Return the error of a file that is neither a ledger nor an export."""
    return DataError(
        f"{source}: {reason}",
        wanted="a ledger, or an export of one",
        do="ask for the file again, or write one with `assay poc ledger export`",
    )
