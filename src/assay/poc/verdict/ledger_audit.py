"""Audits of a ledger or of an export: every hash, every place and every verdict.

An audit checks every hash and place in the order of the entries, and then computes every verdict
again, one account after the other. Its result names the first entry that is wrong. Numbers may
differ in their last digits, as those of two machines do. docs/ledger.md says what it takes as it
is, and that only a published head shows a rewritten chain.
"""

import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from assay.errors import AssayError, DataError, UsageError
from assay.files.jsonl import read_lines
from assay.files.sqlite import Database
from assay.files.sqlite_schema import SCHEMA, schema_changes, table_names
from assay.poc.verdict.entries import Entry, Genesis, sha256, verdict_on_life
from assay.poc.verdict.ledger import AccountState, export_lines, find_repeated, head_line
from assay.poc.verdict.ledger_tables import (
    ACCOUNTS,
    AT_ONCE,
    LAWS,
    LEDGER,
    MIGRATIONS,
    OF_ACCOUNT,
    UPDATES,
    insert_account,
    insert_entry,
    insert_genesis,
    insert_law,
    open_database,
    read_noise,
    text_of,
)
from assay.poc.verdict.life import Life

MAGIC = b"SQLite format 3\0"
# Relative and absolute difference of numbers that two machines may compute.
CLOSE = 1e-6
# seconds by which a clock may be set back, or be ahead of that of the audit, before the audit notes
# it
CLOCK = 60.0
_NUMBERS = ("log_e_value", "log_e_max", "log_evidence_honest", "log_e_held")
_EXACT = ("audits", "recorded", "n", "tests", "share")
_OF_FAULTS = ("credited", "strikes")  # which entries of before 0.4 do not have
_ROWS = (
    sa.select(UPDATES, *OF_ACCOUNT, LAWS.c.hash.label("known"))
    .select_from(
        UPDATES.outerjoin(ACCOUNTS, ACCOUNTS.c.id == UPDATES.c.account).outerjoin(
            LAWS, LAWS.c.hash == UPDATES.c.law
        )
    )
    .order_by(UPDATES.c.seq)
)


@dataclass(frozen=True, kw_only=True)
class LedgerFault:
    """A fault in words, and the number of its entry; None outside entries."""

    entry: int | None
    reason: str

    def __str__(self) -> str:
        return f"entry {self.entry}: {self.reason}" if self.entry is not None else self.reason


@dataclass(frozen=True, kw_only=True)
class LedgerAudit:
    """The result of an audit.

    Args:
        entries: Number of entries that were read.
        accounts: Number of accounts.
        head: Hash of the last entry without a fault.
        published: Hash of a head that had to be in the chain; None where none was given.
        faults: Faults in the order of the entries; empty for a clean ledger.
        notes: What a reader should know and is no fault: clocks that were wrong, and outcomes that
            were taken as they are.
    """

    entries: int
    accounts: int
    head: str
    published: str | None
    faults: tuple[LedgerFault, ...]
    notes: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    @property
    def exit_code(self) -> int:
        """0 for a clean ledger, 1 for one that was tampered with."""
        return 0 if self.clean else 1

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {**asdict(self), "clean": self.clean}


class _EntryChain:
    """The entries in their order, with their form, place, hash, columns and times, up to the first
    fault.
    """

    def __init__(self, connection: sa.Connection, head: str | None) -> None:
        self.faults: list[LedgerFault] = []
        self.entries = 0
        self.hash = ""
        self.found = False
        self._noted = defaultdict[str, list[int]](list)
        self.genesis: Genesis | None = None
        # One head is right; a second one shows that the table was altered.
        heads = connection.execute(sa.select(LEDGER)).fetchmany(2)
        try:
            self.genesis = Genesis.parse(
                text_of(heads[0].genesis if heads else None), "the beginning of the ledger"
            )
        except DataError as error:
            self.faults.append(LedgerFault(entry=None, reason=error.seen))
            return
        self.hash = self.genesis.hash
        self.found = head == self.hash
        # Clocks differ and are set back, so a strange time is a note and no fault.
        before = self.genesis.created
        latest = time.time() + CLOCK
        for row in connection.execute(_ROWS, execution_options={"yield_per": AT_ONCE}):
            entry = self._read(row)
            if isinstance(entry, str):
                self.faults.append(LedgerFault(entry=self.entries + 1, reason=entry))
                return
            if entry.time < before - CLOCK:
                older = f"more than {CLOCK:g} s older than what stands before them"
                self._noted[older].append(row.seq)
            if entry.time > latest:
                self._noted["in the future"].append(row.seq)
            before = entry.time
            self.entries = self.entries + 1
            self.hash = row.hash
            self.found = self.found or head == self.hash
        count, hash = (heads[0]._mapping[name] for name in ("count", "hash"))
        if len(heads) != 1 or (count, hash) != (self.entries, self.hash):
            named = f"the head names {count!s:.20} entries and {hash!s:.80}"
            self.faults.append(
                LedgerFault(entry=self.entries + 1, reason=f"not there, or changed: {named}")
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """What is no fault, in words."""
        return tuple(
            f"entries {note}: {len(seqs)}, from entry {seqs[0]} on"
            for note, seqs in self._noted.items()
        )

    def _read(self, row: sa.Row[Any]) -> Entry | str:
        """Return the next entry, or what is wrong with it."""
        text = text_of(row.entry)
        if row.seq != self.entries + 1:
            return f"missing: the next one is {row.seq!r:.20}"
        if sha256(text) != row.hash:
            return "its text does not have its hash"
        try:
            entry = Entry.parse(text, "its text")
        except DataError as error:
            return error.seen
        columns = (row.round, row.name, row.law, row.public_key, row.digest, row.build, row.preset)
        stated = (entry.round, entry.name, entry.law, *vars(entry.account).values())
        is_wrong = {
            f"in the place of entry {entry.seq}": entry.seq != row.seq,
            "it does not follow the entry before it": entry.previous != self.hash,
            "its columns are not what its text says": columns != stated,
            f"the law {entry.law[:12]} is missing": row.known != entry.law,
        }
        return next((reason for reason, wrong in is_wrong.items() if wrong), entry)


def _wrong_outcomes(connection: sa.Connection, chain: _EntryChain) -> list[LedgerFault]:
    """Return the first entry that does not follow from the evidence, if any; one account at a time
    bounds memory.
    """
    if chain.genesis is None:
        return []
    faults = list[LedgerFault]()
    accounts = sa.select(UPDATES.c.account).where(UPDATES.c.seq <= chain.entries).distinct()
    for (account,) in connection.execute(accounts).all():
        reasons = _differences(connection, chain.entries, account, AccountState(chain.genesis))
        if not reasons:
            continue
        # Entries of before 0.4 have their tests in one unit, up to the first one that has not.
        state = AccountState(chain.genesis, one_unit=True)
        earlier = _differences(connection, chain.entries, account, state)
        present = min(earlier.keys() - reasons.keys(), default=math.inf)
        faults += [
            LedgerFault(entry=seq, reason=reason)
            for seq, reason in reasons.items()
            if seq in earlier or seq > present
        ]
    return sorted(faults, key=lambda fault: fault.entry or 0)[:1]


def _differences(
    connection: sa.Connection, last: int, account: int, state: AccountState
) -> dict[int, str]:
    """Return how entries of an account, up to the last one, differ from what a fresh state
    gives.
    """
    reasons = dict[int, str]()
    query = (
        sa.select(UPDATES.c.entry)
        .where((UPDATES.c.account == account) & (UPDATES.c.seq <= last))
        .order_by(UPDATES.c.seq)
    )
    seen = defaultdict[str, set[int]](set)
    has_credit = False
    for text in connection.execute(query, execution_options={"yield_per": AT_ONCE}).scalars():
        entry = Entry.parse(text, "an entry")
        try:
            follows = state.take(entry, read_noise(connection, entry.law))
            has_credit = has_credit or entry.outcome.credited is not None
            names: tuple[str, ...] = (*_EXACT, *_NUMBERS, *_OF_FAULTS)
            if not has_credit:  # of before 0.4, when an accusation opened no fault
                follows = follows.model_copy(update={"fault": state.life.called_fault})
                names = (*_EXACT, *_NUMBERS)
            reason = _find_difference(entry, follows, seen[entry.round], state.life, names)
        except AssayError as error:  # not a law, or one of which no test can be made
            reason = error.seen
        seen[entry.round].update(entry.nonces)
        if reason:
            reasons[entry.seq] = reason
    return reasons


def _find_difference(
    entry: Entry, follows: Entry, recorded: set[int], life: Life, names: Sequence[str]
) -> str | None:
    """Return how an entry differs from what follows from its evidence; None if it does not.

    ``names`` are the numbers of its outcome that are compared.
    """
    if entry.excluded != find_repeated(entry.nonces, recorded):
        return "the nonces that do not count are not those that were there before"
    if entry.fault != follows.fault:
        return f"fault {entry.fault!r:.80}, where the evidence gives {follows.fault!r:.80}"
    for name in names:
        stated = getattr(entry.outcome, name)
        computed = getattr(follows.outcome, name)
        is_near = name in _NUMBERS and None not in (stated, computed)
        if stated != computed and not (
            is_near and math.isclose(stated, computed, rel_tol=CLOSE, abs_tol=CLOSE)
        ):
            return f"{name} {stated!r}, where the evidence gives {computed!r}"
    # Of the numbers as stated: on the threshold, two machines may differ.
    verdict = verdict_on_life(entry.evidence, alpha=life.alpha, beta=life.beta)
    if entry.outcome.verdict == verdict:
        return None
    return f"verdict {entry.outcome.verdict}, where its numbers give {verdict}"


def _beside_entries(connection: sa.Connection) -> Iterator[LedgerFault]:
    """Yield pages that are damaged, and laws and accounts that no entry names: nothing but an entry
    adds one.
    """
    integrity = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar()
    # An index that leaves out a row would hide nonces that were seen.
    if integrity != "ok":
        yield LedgerFault(entry=None, reason=f"the file: {integrity!s:.200}")
    for table, key, column in (
        (LAWS, LAWS.c.hash, UPDATES.c.law),
        (ACCOUNTS, ACCOUNTS.c.id, UPDATES.c.account),
    ):
        unused = connection.execute(
            sa.select(key).where(key.not_in(sa.select(column))).limit(1)
        ).first()
        if unused:
            yield LedgerFault(
                entry=None, reason=f"{table.name}: {unused[0]!r:.20} belongs to no entry"
            )


@dataclass(frozen=True)
class LedgerSource:
    """A ledger to read: its own database, or an export in a temporary one."""

    path: Path
    database: Database
    stated: str | None

    def audit(self, head: str | None = None) -> LedgerAudit:
        """Audit the chain, in which a published hash must be, and all that the file defines."""
        with self.database.read() as connection:
            changes = schema_changes(connection.exec_driver_sql(SCHEMA), MIGRATIONS)
            faults = [LedgerFault(entry=None, reason=change) for change in changes]
            if any(change.startswith("the table") for change in changes):
                # Anything may stand in its place, such as a view without an end.
                return LedgerAudit(
                    entries=0, accounts=0, head="", published=head, faults=tuple(faults)
                )
            chain = _EntryChain(connection, head)
            faults = [
                *chain.faults,
                *_wrong_outcomes(connection, chain),
                *faults,
                *_beside_entries(connection),
            ]
            if head is not None and not chain.found:
                faults.append(
                    LedgerFault(
                        entry=None,
                        reason=f"the published head {head} is not in the chain: entries were "
                        f"rewritten or cut off since",
                    )
                )
            if not faults and self.stated not in (None, head_line(chain.entries, chain.hash)):
                faults.append(
                    LedgerFault(
                        entry=chain.entries + 1, reason=f"not there, or changed: {self.stated:.120}"
                    )
                )
            return LedgerAudit(
                entries=chain.entries,
                accounts=int(
                    connection.execute(
                        sa.select(sa.func.count()).select_from(ACCOUNTS)
                    ).scalar_one()
                ),
                head=chain.hash,
                published=head,
                faults=tuple(
                    sorted(
                        faults, key=lambda fault: math.inf if fault.entry is None else fault.entry
                    )
                ),
                notes=chain.notes,
            )


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


@contextmanager
def open_source(path: Path) -> Iterator[LedgerSource]:
    """Open a ledger or an export read-only; a DataError names a malformed line."""
    is_ledger = next(read_lines(path), (1, b""))[1].startswith(MAGIC)
    if is_ledger and LEDGER.name not in table_names(path, flag="ledger"):
        raise not_an_export(str(path), "a database without a ledger")
    with tempfile.TemporaryDirectory(prefix="assay-ledger-") as folder:
        database = (
            open_database(path, read_only=True)
            if is_ledger
            else open_database(Path(folder, "copy.sqlite3"))
        )
        try:
            yield LedgerSource(path, database, None if is_ledger else read_export(path, database))
        finally:
            database.close()


def audit_ledger(path: str | Path, *, head: str | None = None) -> LedgerAudit:
    """Audit a ledger or an export read-only: every hash, place and verdict.

    ``head`` is the hash of a head that was published once; entries up to it must still be there.

    Raises:
        UsageError: The head cannot be one.
        DataError: The file is neither.
        StorageError: The file cannot be read.
    """
    if head is not None and (len(head) != 64 or set(head) - set("0123456789abcdef")):
        raise UsageError(
            f"--head {head:.80}",
            wanted="64 hexadecimal digits, in lower case",
            do="give the hash that was published",
        )
    with open_source(Path(path)) as source:
        return source.audit(head)
