"""The audit of a ledger: every hash, every place, and every verdict computed again from the evidence.

The chain is read first, in the order of the entries. Then the entries of each account are taken one after the other, as
when they were written. The result names the first entry that is wrong. Numbers may differ in their last digits, as
those of two machines do.

Whoever rewrites the file from one entry to the end, with its hashes, leaves a chain without a fault. Only a hash of the
head that was published before shows that another chain stood there.
"""

import math
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from assay.errors import AssayError, DataError, UsageError
from assay.files.database import Database
from assay.files.jsonl import loads
from assay.poc.verdict.ledger_entries import (
    ACCOUNTS,
    LAWS,
    LEDGER,
    MIGRATIONS,
    REPEATED,
    UPDATES,
    Account,
    AccountState,
    Entry,
    EntryOutcome,
    Genesis,
    find_excluded,
    sha256,
)
from assay.poc.verdict.response_noise import AnyNoise, noise_from_dict
from assay.stats.sequential import decide

AT_ONCE = 256  # rows that are read at a time
MOST_LAWS = 1024  # laws that are kept in memory
CLOSE = 1e-6  # relative and absolute difference of numbers that two machines may compute

_NUMBERS = ("log_e_value", "log_e_max", "log_evidence_honest")
_COUNTS = ("audits", "recorded", "n", "tests")


@dataclass(frozen=True, kw_only=True)
class Fault:
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
    """

    entries: int
    accounts: int
    head: str
    published: str | None
    faults: tuple[Fault, ...]

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


def check_head(head: str | None) -> None:
    """Refuse a published head that is no SHA-256."""
    if head is not None and (len(head) != 64 or set(head) - set("0123456789abcdef")):
        raise UsageError(
            f"--head {head:.80}", wanted="64 hexadecimal digits, in lower case", do="give the hash that was published"
        )


def audit_database(database: Database, *, head: str | None = None, whole: bool = True) -> LedgerAudit:
    """Audit the ledger in a database, with the triggers and indexes of a ledger where it is ``whole``."""
    with database.read() as connection:
        changed = list(_changed_schema(connection)) if whole else []
        if any(fault.reason.startswith("the table") for fault in changed):
            # Anything may stand in its place, such as a view without an end.
            return LedgerAudit(entries=0, accounts=0, head="", published=head, faults=tuple(changed))
        chain = _Chain(connection, head)
        changed += _damaged_pages(connection)
        faults = [*chain.faults, *_wrong_outcomes(connection, chain), *changed]
        if not faults:
            faults += _find_unused(connection)
        if head is not None and not chain.found:
            seen = f"the published head {head} is not in the chain: entries were rewritten or cut off since"
            faults.append(Fault(entry=None, reason=seen))
        return LedgerAudit(
            entries=chain.entries,
            accounts=int(connection.execute(sa.select(sa.func.count()).select_from(ACCOUNTS)).scalar_one()),
            head=chain.hash,
            published=head,
            faults=tuple(sorted(faults, key=lambda fault: math.inf if fault.entry is None else fault.entry)),
        )


class _Chain:
    """The entries in their order, with their form, place, hash and columns, up to the first fault."""

    def __init__(self, connection: sa.Connection, head: str | None) -> None:
        self.faults: list[Fault] = []
        self.entries, self.hash, self.found = 0, "", False
        self.genesis: Genesis | None = None
        heads = connection.execute(sa.select(LEDGER)).fetchmany(2)
        try:
            self.genesis = Genesis.parse(text_of(heads[0].genesis if heads else None), "the beginning of the ledger")
        except DataError as error:
            self.faults.append(Fault(entry=None, reason=error.seen))
            return
        self.hash = self.genesis.hash
        self.found = head == self.hash
        for row in connection.execute(_ROWS, execution_options={"yield_per": AT_ONCE}):
            if reason := self._find_fault(row):
                self._add_fault(reason)
                return
            self.entries, self.hash = self.entries + 1, row.hash
            self.found = self.found or head == self.hash
        stated = tuple(heads[0]._mapping[name] for name in ("count", "hash"))
        if len(heads) != 1 or stated != (self.entries, self.hash):
            self._add_fault(other_head(*stated))

    def _add_fault(self, reason: str) -> None:
        self.faults.append(Fault(entry=self.entries + 1, reason=reason))

    def _find_fault(self, row: sa.Row[Any]) -> str | None:
        """Return what is wrong with the next row."""
        text = text_of(row.entry)
        if row.seq != self.entries + 1:
            return f"missing: the next one is {row.seq!r:.20}"
        if sha256(text) != row.hash:
            return "its text does not have its hash"
        try:
            entry = Entry.parse(text, "its text")
        except DataError as error:
            return error.seen
        if entry.seq != row.seq:
            return f"in the place of entry {entry.seq}"
        if entry.previous != self.hash:
            return "it does not follow the entry before it"
        columns = (row.round, row.name, row.law, row.public_key, row.digest, row.build, row.preset)
        if columns != (entry.round, entry.name, entry.law, *vars(entry.owner).values()):
            return "its columns are not what its text says"
        return None if row.known == entry.law else f"the law {entry.law[:12]} is missing"


def other_head(count: object, hash: object) -> str:
    """Return the reason of a fault where the head names other entries than there are."""
    return f"not there, or changed: the head names {count!s:.20} entries and {hash!s:.80}"


_ROWS = (
    sa.select(UPDATES, *(ACCOUNTS.c[name] for name in Account.__dataclass_fields__), LAWS.c.hash.label("known"))
    .select_from(
        UPDATES.outerjoin(ACCOUNTS, ACCOUNTS.c.id == UPDATES.c.account).outerjoin(LAWS, LAWS.c.hash == UPDATES.c.law)
    )
    .order_by(UPDATES.c.seq)
)


def _wrong_outcomes(connection: sa.Connection, chain: _Chain) -> list[Fault]:
    """Return the first entry that does not follow from the evidence, if any; one account at a time bounds memory."""
    if chain.genesis is None:
        return []
    noises, faults = Noises(), list[Fault]()
    owner, state, seen = None, AccountState(chain.genesis), defaultdict[str, set[int]](set)
    query = sa.select(UPDATES.c.account, UPDATES.c.entry).where(UPDATES.c.seq <= chain.entries)
    query = query.order_by(UPDATES.c.account, UPDATES.c.seq)
    for account, text in connection.execute(query, execution_options={"yield_per": AT_ONCE}):
        if account != owner:
            owner, state, seen = account, AccountState(chain.genesis), defaultdict(set)
        entry = Entry.parse(text, "an entry")
        try:
            outcome = state.take(entry, noises.read(connection, entry.law))
            reason = _find_difference(entry, outcome, seen[entry.round], chain.genesis)
        except AssayError as error:  # not a law, or one of which no test can be made
            reason = error.seen
        seen[entry.round].update(entry.nonces)
        if reason:
            faults.append(Fault(entry=entry.seq, reason=reason))
    return sorted(faults, key=lambda fault: fault.entry or 0)[:1]


def _find_difference(entry: Entry, outcome: EntryOutcome, seen: set[int], genesis: Genesis) -> str | None:
    """Return how an entry differs from what follows from its evidence."""
    repeated = [place for place, _ in find_excluded(entry.nonces, seen, {})]
    if repeated != [place for place, reason in entry.excluded if reason == REPEATED]:
        return "the nonces that do not count are not those that were there before"
    stated = entry.outcome
    for name in (*_COUNTS, *_NUMBERS):
        one, other = getattr(stated, name), getattr(outcome, name)
        if not math.isclose(one, other, rel_tol=CLOSE, abs_tol=CLOSE if name in _NUMBERS else 0.0):
            return f"{name} {one!r}, where the evidence gives {other!r}"
    follows = decide(
        stated.log_e_max, stated.log_evidence_honest, alpha=genesis.alpha, beta=genesis.beta
    )  # of the numbers as stated: on the threshold, two machines may differ
    return None if stated.verdict == follows else f"verdict {stated.verdict}, where the evidence gives {follows}"


class Noises:
    """Laws by their hash, read when they are first used."""

    def __init__(self) -> None:
        self._noises: dict[str, AnyNoise] = {}

    def read(self, connection: sa.Connection, law: str) -> AnyNoise:
        """Return the noise of a law, which must be there, have its hash, and be one."""
        if law not in self._noises:
            text = text_of(connection.execute(sa.select(LAWS.c.law).where(LAWS.c.hash == law)).scalar())
            if sha256(text) != law:
                raise DataError(
                    f"the law {law[:12]} does not have its hash", wanted="the law as it was", do="restore it"
                )
            if len(self._noises) >= MOST_LAWS:
                self._noises.clear()
            self._noises[law] = noise_from_dict(loads(text, f"the law {law[:12]}"))
        return self._noises[law]


def _find_unused(connection: sa.Connection) -> Iterator[Fault]:
    """Yield laws and accounts that no entry names: nothing but an entry adds one."""
    for table, key, column in ((LAWS, LAWS.c.hash, UPDATES.c.law), (ACCOUNTS, ACCOUNTS.c.id, UPDATES.c.account)):
        found = connection.execute(sa.select(key).where(key.not_in(sa.select(column))).limit(1)).first()
        if found:
            yield Fault(entry=None, reason=f"{table.name}: {found[0]!r:.20} belongs to no entry")


def _damaged_pages(connection: sa.Connection) -> Iterator[Fault]:
    """Yield what SQLite itself finds wrong: an index that leaves out a row would hide nonces that were seen."""
    found = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar()
    if found != "ok":
        yield Fault(entry=None, reason=f"the file: {found!s:.200}")


def _changed_schema(connection: sa.Connection) -> Iterator[Fault]:
    """Yield the triggers, tables and indexes that are missing, added or changed."""
    query = "SELECT type || ' ' || name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%' AND name <> 'migrations'"
    begun = sqlite3.connect(":memory:")
    try:
        for statement in (statement for step in MIGRATIONS for statement in step):
            begun.execute(statement)
        wanted = dict(begun.execute(query).fetchall())
    finally:
        begun.close()
    found = {row[0]: row[1] for row in connection.exec_driver_sql(query)}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            what = "missing" if name not in found else "changed" if name in wanted else "not of a ledger"
            yield Fault(entry=None, reason=f"the {name} is {what}")


def text_of(value: object) -> str:
    """Return a text that is to be parsed; an empty one for anything else, which no parser takes."""
    return value if isinstance(value, str) else ""
