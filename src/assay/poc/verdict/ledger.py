"""The ledger of nodes' lives: one SQLite file, to which every audit adds an entry, and from which
none is removed.

An export of a ledger is JSON Lines: its genesis, every law before its first use, the entries byte
for byte, its head. An audit checks every hash and place in the order of the entries, and then
computes every verdict again, one account after the other. Its result names the first entry that is
wrong. Numbers may differ in their last digits, as those of two machines do. docs/ledger.md says
what it takes as it is, and that only a published head shows a rewritten chain.
"""

import math
import secrets
import tempfile
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from assay.errors import AssayError, DataError, UsageError
from assay.files.jsonl import dumps, loads, read_lines
from assay.files.sqlite import Database
from assay.files.sqlite_connections import damaged
from assay.files.sqlite_schema import SCHEMA, schema_changes, table_names
from assay.files.storage import PartialFile
from assay.poc.verdict.judge import Verdict
from assay.poc.verdict.life import (
    REPEATED,
    Account,
    Entry,
    Evidence,
    Genesis,
    Life,
    Standing,
    Update,
    make_entry,
    round_identity,
    sha256,
    verdict_on_life,
)
from assay.poc.verdict.noise import ALPHA, BETA, AnyNoise, noise_from_dict

AT_ONCE = 256  # rows that are read at a time
LIVES = 1024  # accounts kept in memory; others are rebuilt from their entries when they are needed
MAGIC = b"SQLite format 3\0"
CLOSE = 1e-6  # relative and absolute difference of numbers that two machines may compute
# seconds by which a clock may be set back, or be ahead of that of the audit, before the audit notes
# it
CLOCK = 60.0
FLAG = {
    False: "--ledger",
    True: "ledger",
}  # what errors call the file: commands that only read it have no flag
_NUMBERS = ("log_e_value", "log_e_max", "log_evidence_honest", "log_e_held")
_EXACT = ("audits", "recorded", "n", "tests", "share")


def _never(table: str, what: str) -> str:
    return f"""CREATE TRIGGER {table}_never_{what.lower()} BEFORE {what} ON {table}
        BEGIN SELECT RAISE(ABORT, 'a ledger only grows'); END"""


# Steps that lead to the tables of a ledger. A step, once released, is never edited. Columns other
# than ``entry`` repeat parts of it, for searching; an audit compares them.
MIGRATIONS = (
    (
        """CREATE TABLE ledger (
            id INTEGER PRIMARY KEY CHECK (id = 1),
            genesis TEXT NOT NULL, count INTEGER NOT NULL, hash TEXT NOT NULL
        )""",
        "CREATE TABLE laws (hash TEXT PRIMARY KEY, law TEXT NOT NULL) WITHOUT ROWID",
        """CREATE TABLE accounts (
            id INTEGER PRIMARY KEY,
            public_key TEXT NOT NULL, digest TEXT NOT NULL, build TEXT NOT NULL, preset TEXT NOT NULL,
            UNIQUE (public_key, digest, build, preset)
        )""",
        """CREATE TABLE updates (
            seq INTEGER PRIMARY KEY,
            account INTEGER NOT NULL REFERENCES accounts (id),
            round TEXT NOT NULL, name TEXT UNIQUE,
            law TEXT NOT NULL REFERENCES laws (hash),
            entry TEXT NOT NULL, hash TEXT NOT NULL
        )""",
        "CREATE INDEX updates_of_account ON updates (account, seq)",
        "CREATE INDEX updates_of_round ON updates (account, round)",
        *(
            _never(table, what)
            for table in ("laws", "accounts", "updates")
            for what in ("UPDATE", "DELETE")
        ),
        _never("ledger", "DELETE"),
        """CREATE TRIGGER updates_in_order BEFORE INSERT ON updates
            WHEN NEW.seq IS NOT (SELECT count + 1 FROM ledger)
            BEGIN SELECT RAISE(ABORT, 'a ledger only grows'); END""",
        """CREATE TRIGGER ledger_counts_up BEFORE UPDATE ON ledger
            WHEN NEW.count IS NOT OLD.count + 1 OR NEW.genesis IS NOT OLD.genesis
            BEGIN SELECT RAISE(ABORT, 'a ledger only grows'); END""",
        """CREATE VIEW evidence AS SELECT
            seq, json_extract(entry, '$.time') AS time,
            json_extract(entry, '$.account.public_key') AS public_key,
            json_extract(entry, '$.account.digest') AS digest,
            json_extract(entry, '$.account.build') AS build,
            json_extract(entry, '$.account.preset') AS preset,
            json_extract(entry, '$.block_hash') AS block_hash,
            json_extract(entry, '$.proof') AS proof,
            json_array_length(entry, '$.nonces') AS nonces,
            json_array_length(entry, '$.excluded') AS excluded,
            json_extract(entry, '$.outcome.verdict') AS verdict,
            json_extract(entry, '$.outcome.log_e_value') AS log_e_value,
            json_extract(entry, '$.outcome.log_e_max') AS log_e_max,
            json_extract(entry, '$.outcome.log_evidence_honest') AS log_evidence_honest
        FROM updates""",
    ),
)

LEDGER, LAWS, ACCOUNTS, UPDATES = (
    sa.table(name, *map(sa.column, columns.split()))
    for name, columns in (
        ("ledger", "id genesis count hash"),
        ("laws", "hash law"),
        ("accounts", "id public_key digest build preset"),
        ("updates", "seq account round name law entry hash"),
    )
)
OF_ACCOUNT = [column for column in ACCOUNTS.c if column.name != "id"]  # the columns of an `Account`


def select_account(account: Account) -> sa.Select[Any]:
    """Return the query of the number that an account has in a ledger."""
    same = sa.and_(*(ACCOUNTS.c[name] == value for name, value in vars(account).items()))
    return sa.select(ACCOUNTS.c.id).where(same)


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
        notes: What a reader should know and is no fault: clocks that were wrong, and outcomes that
            were taken as they are.
    """

    entries: int
    accounts: int
    head: str
    published: str | None
    faults: tuple[Fault, ...]
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


class _Chain:
    """The entries in their order, with their form, place, hash, columns and times, up to the first
    fault.
    """

    def __init__(self, connection: sa.Connection, head: str | None) -> None:
        self.faults: list[Fault] = []
        self.entries = 0
        self.hash = ""
        self.found = False
        self._noted = defaultdict[str, list[int]](list)
        self._newer = False
        self.genesis: Genesis | None = None
        heads = connection.execute(sa.select(LEDGER)).fetchmany(2)
        try:
            self.genesis = Genesis.parse(
                text_of(heads[0].genesis if heads else None), "the beginning of the ledger"
            )
        except DataError as error:
            self.faults.append(Fault(entry=None, reason=error.seen))
            return
        self.hash = self.genesis.hash
        self.found = head == self.hash
        before = self.genesis.created
        latest = time.time() + CLOCK
        for row in connection.execute(_ROWS, execution_options={"yield_per": AT_ONCE}):
            entry = self._read(row)
            if isinstance(entry, str):
                self._add_fault(entry)
                return
            for noted, what in (
                (entry.former, "of earlier releases, whose outcomes were not computed again"),
                (
                    entry.time < before - CLOCK,
                    f"more than {CLOCK:g} s older than what stands before them",
                ),
                (entry.time > latest, "in the future"),
            ):
                if noted:
                    self._noted[what].append(row.seq)
            self._newer = self._newer or not (entry.former or entry.of_response)
            before = entry.time
            self.entries = self.entries + 1
            self.hash = row.hash
            self.found = self.found or head == self.hash
        count, hash = (heads[0]._mapping[name] for name in ("count", "hash"))
        if len(heads) != 1 or (count, hash) != (self.entries, self.hash):
            self._add_fault(
                f"not there, or changed: the head names {count!s:.20} entries and {hash!s:.80}"
            )

    def _add_fault(self, reason: str) -> None:
        self.faults.append(Fault(entry=self.entries + 1, reason=reason))

    @property
    def notes(self) -> tuple[str, ...]:
        """What is no fault, in words."""
        return tuple(
            f"entries {what}: {len(seqs)}, from entry {seqs[0]} on"
            for what, seqs in self._noted.items()
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
        if entry.seq != row.seq:
            return f"in the place of entry {entry.seq}"
        if entry.previous != self.hash:
            return "it does not follow the entry before it"
        columns = (row.round, row.name, row.law, row.public_key, row.digest, row.build, row.preset)
        if columns != (entry.round, entry.name, entry.law, *vars(entry.account).values()):
            return "its columns are not what its text says"
        if entry.former and self._newer:
            return "an outcome by the rule of earlier releases, after one by the rule of now"
        return entry if row.known == entry.law else f"the law {entry.law[:12]} is missing"


_ROWS = (
    sa.select(UPDATES, *OF_ACCOUNT, LAWS.c.hash.label("known"))
    .select_from(
        UPDATES.outerjoin(ACCOUNTS, ACCOUNTS.c.id == UPDATES.c.account).outerjoin(
            LAWS, LAWS.c.hash == UPDATES.c.law
        )
    )
    .order_by(UPDATES.c.seq)
)


def _wrong_outcomes(connection: sa.Connection, chain: _Chain) -> list[Fault]:
    """Return the first entry that does not follow from the evidence, if any; one account at a time
    bounds memory.
    """
    if chain.genesis is None:
        return []
    faults = list[Fault]()
    owner = None
    state = AccountState(chain.genesis)
    seen = defaultdict[str, set[int]](set)
    query = sa.select(UPDATES.c.account, UPDATES.c.entry).where(UPDATES.c.seq <= chain.entries)
    query = query.order_by(UPDATES.c.account, UPDATES.c.seq)
    for account, text in connection.execute(query, execution_options={"yield_per": AT_ONCE}):
        if account != owner:
            owner = account
            state = AccountState(chain.genesis)
            seen = defaultdict(set)
        entry = Entry.parse(text, "an entry")
        try:
            follows = state.take(entry, read_noise(connection, entry.law))
            reason = _find_difference(entry, follows, seen[entry.round], chain.genesis)
        except AssayError as error:  # not a law, or one of which no test can be made
            reason = error.seen
        seen[entry.round].update(entry.nonces)
        if reason:
            faults.append(Fault(entry=entry.seq, reason=reason))
    return sorted(faults, key=lambda fault: fault.entry or 0)[:1]


def _find_difference(entry: Entry, follows: Entry, seen: set[int], genesis: Genesis) -> str | None:
    """Return how an entry differs from what follows from its evidence; of an earlier release,
    little is compared.
    """
    left_out = [one for one in entry.excluded if one[1] == REPEATED or not entry.former]
    if left_out != find_repeated(entry.nonces, seen):
        return "the nonces that do not count are not those that were there before"
    if not entry.former and entry.fault != follows.fault:
        return f"fault {entry.fault!r:.80}, where the evidence gives {follows.fault!r:.80}"
    for name in ("audits", "recorded") if entry.former else (*_EXACT, *_NUMBERS):
        one = getattr(entry.outcome, name)
        other = getattr(follows.outcome, name)
        both = name in _NUMBERS and None not in (one, other)
        if not (math.isclose(one, other, rel_tol=CLOSE, abs_tol=CLOSE) if both else one == other):
            return f"{name} {one!r}, where the evidence gives {other!r}"
    # Of the numbers as stated: on the threshold, two machines may differ.
    stated = entry.outcome.verdict
    verdict = verdict_on_life(entry.outcome, alpha=genesis.alpha, beta=genesis.beta)
    return None if stated == verdict else f"verdict {stated}, where its numbers give {verdict}"


def read_noise(connection: sa.Connection, law: str) -> AnyNoise:
    """Return the noise of a law by its hash; the law must be there, have its hash, and be one."""
    text = text_of(connection.execute(sa.select(LAWS.c.law).where(LAWS.c.hash == law)).scalar())
    if sha256(text) != law:
        raise DataError(
            f"the law {law[:12]} does not have its hash",
            wanted="the law as it was",
            do="restore it",
        )
    return _parse_noise(text)


@lru_cache(maxsize=1024)
def _parse_noise(text: str) -> AnyNoise:
    return noise_from_dict(loads(text, f"the law {sha256(text)[:12]}"))


def _beside_entries(connection: sa.Connection) -> Iterator[Fault]:
    """Yield pages that are damaged, and laws and accounts that no entry names: nothing but an entry
    adds one.
    """
    found = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar()
    if found != "ok":  # an index that leaves out a row would hide nonces that were seen
        yield Fault(entry=None, reason=f"the file: {found!s:.200}")
    for table, key, column in (
        (LAWS, LAWS.c.hash, UPDATES.c.law),
        (ACCOUNTS, ACCOUNTS.c.id, UPDATES.c.account),
    ):
        unused = connection.execute(
            sa.select(key).where(key.not_in(sa.select(column))).limit(1)
        ).first()
        if unused:
            yield Fault(entry=None, reason=f"{table.name}: {unused[0]!r:.20} belongs to no entry")


def text_of(value: object) -> str:
    """Return a text that is to be parsed; an empty one for anything else, which no parser takes."""
    return value if isinstance(value, str) else ""


class AccountState:
    """The life of one account of a ledger, which takes its entries one after the other."""

    def __init__(self, genesis: Genesis) -> None:
        self.life = Life(alpha=genesis.alpha, beta=genesis.beta)
        self.audits = self.recorded = self.last = 0

    def take(self, entry: Entry, noise: AnyNoise) -> Entry:
        """Take the residuals of an entry that count, and return it with the fault and the outcome
        that follow.
        """
        self.audits = self.audits + 1
        self.recorded = self.recorded + len(entry.nonces)
        self.last = entry.seq
        found = entry.give(self.life, noise).evidence
        outcome = found.model_copy(update={"audits": self.audits, "recorded": self.recorded})
        return entry.model_copy(update={"outcome": outcome, "fault": found.faulty_places})


class Ledger(AbstractContextManager["Ledger"]):
    """The evidence of every audit of every node, one e-process per account, on disk before anything
    is acknowledged.

    Several processes may write to one file. A nonce counts once per account and round: of a proof
    that is checked twice, the nonces that were checked before are recorded and do not count.
    docs/ledger.md shows it in use.

    Args:
        path: File of the ledger. It is created if it does not exist.
        alpha: Bound on the chance that an honest node is ever accused, in its whole life; that of
            the file when None, and .001 for a new one.
        beta: Bound on the chance that a cheater is called honest; that of the file when None, and
            .01 for a new one.
        read_only: Whether the file must exist and stay as it is.

    Raises:
        UsageError: The file is no ledger, or was begun at other error rates.
        StorageError: The file cannot be read or written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        alpha: float | None = None,
        beta: float | None = None,
        read_only: bool = False,
    ) -> None:
        self.path = Path(path)
        self._find_change = f"find what was changed: assay poc ledger audit {path}"
        check_ledger(self.path, read_only=read_only)
        self._db = _open(self.path, read_only=read_only, flag=FLAG[read_only])
        self._appending = threading.Lock()
        self._states: OrderedDict[int, AccountState] = OrderedDict()
        try:
            if not read_only:
                self._begin(ALPHA if alpha is None else alpha, BETA if beta is None else beta)
            with self._db.read() as connection:
                text = text_of(connection.execute(sa.select(LEDGER.c.genesis)).scalar())
            self.genesis = Genesis.parse(text, f"{self.path}, the beginning")
            for name, wanted in (("alpha", alpha), ("beta", beta)):
                begun = getattr(self.genesis, name)
                if wanted is not None and wanted != begun:
                    seen = f"{name} {wanted:g} for the ledger {self.path}"
                    do = (
                        f"pass --{name} {begun:g} (ASSAY_{name.upper()} to a service), or begin "
                        f"another ledger"
                    )
                    raise UsageError(
                        seen,
                        wanted=f"{begun:g}, at which it was begun: a life has one error rate",
                        do=do,
                    )
        except BaseException:
            self.close()
            raise

    def _begin(self, alpha: float, beta: float) -> None:
        with self._write() as connection:
            if connection.execute(sa.select(LEDGER.c.id)).first() is None:
                if not (0 < alpha < 1 and 0 < beta < 1):
                    seen = f"alpha {alpha}, beta {beta}"
                    raise UsageError(seen, wanted="two rates in (0, 1)", do="pass --alpha 0.001")
                made = Genesis(
                    id=secrets.token_hex(16), created=time.time(), alpha=alpha, beta=beta
                )
                _insert_genesis(connection, made)

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        """Open a transaction in a file that holds nothing else than a ledger: another trigger may
        drop entries.
        """
        with self._db.write() as connection:
            if changes := schema_changes(connection.exec_driver_sql(SCHEMA), MIGRATIONS):
                raise damaged(self.path, changes[0], flag="--ledger")
            yield connection

    @property
    def head(self) -> tuple[int, str]:
        """Number of entries, and the hash that stands for all of them: publish it, and ``audit``
        holds you to it.
        """
        with self._db.read() as connection:
            return self._head(connection)

    def contains(self, count: int, hash: str) -> bool:
        """Return whether this was the :attr:`head` of the ledger once, so that nothing before it is
        missing.
        """
        if not count:
            return hash == self.genesis.hash
        with self._db.read() as connection:
            return (
                connection.execute(sa.select(UPDATES.c.hash).where(UPDATES.c.seq == count)).scalar()
                == hash
            )

    def _head(self, connection: sa.Connection) -> tuple[int, str]:
        count, hash = connection.execute(sa.select(LEDGER.c.count, LEDGER.c.hash)).one()
        query = sa.select(UPDATES.c.seq, UPDATES.c.hash).order_by(UPDATES.c.seq.desc()).limit(1)
        last = connection.execute(query).first() or (0, self.genesis.hash)
        if (count, hash) != tuple(last):
            seen = (
                f"{self.path}: its head says {count!r:.20} entries, and the last one is "
                f"{last[0]!r:.20}"
            )
            raise DataError(
                seen, wanted="a ledger that nothing but assay has written to", do=self._find_change
            )
        return int(count), str(hash)

    def record(
        self, verdict: Verdict, *, proof: str | None = None, build: str | None = None
    ) -> Standing:
        """Add the evidence of a verdict, and return what the life of the node says now; errors are
        :meth:`append`'s.

        ``proof`` is the SHA-256 in the footer of the proof, and ``build`` the name of the prover's
        build. When None, it is that of the pinned build of its fingerprint, or the number format
        where none is pinned: anything else in a fingerprint is the prover's word, and a new word
        must not begin a new life.
        """
        header = verdict.header
        noise = verdict.noise
        if noise is None:
            wanted = "a verdict by a measured law, without which an audit says nothing of a life"
            do = "verify the proof again with a calibration"
            raise UsageError(f"a verdict without a law: {verdict.reason}", wanted=wanted, do=do)
        account = Account(
            public_key=header.round.public_key,
            digest=header.digest,
            build=verdict.pins.build_of(header.fingerprint) if build is None else build,
            preset=header.pipeline.name,
        )
        update = Update(
            account=account,
            round=round_identity(header.round),
            block_hash=header.round.block_hash,
            noise=noise,
            nonces=verdict.nonces,
            residuals=verdict.residuals,
            positions=header.places_of(verdict.nonces),
            batch_size=header.fingerprint.batch_size,
            proof=proof,
            sample_seed=verdict.sample_seed,
        )
        return self.append([update])[0]

    def append(self, updates: Iterable[Update]) -> list[Standing]:
        """Add the evidence of audits, all or none of them; return the standing of the account after
        each.

        Raises:
            UsageError: A value is out of range.
            DataError: The ledger was changed by something else; an audit names the place.
            StorageError: The entries are not on disk, and nothing has changed. So it is where the
                file defines more, less or else than a ledger does, or an entry that is read back is
                not the one that was written.
        """
        with self._appending:
            try:
                with self._write() as connection:
                    return [self._add(connection, update) for update in updates]
            except BaseException:
                # What is in memory may hold values that are not on disk: it is rebuilt when it is
                # needed.
                self._states.clear()
                raise

    def _add(self, connection: sa.Connection, update: Update) -> Standing:
        named = sa.select(UPDATES.c.account, ACCOUNTS.c.public_key).where(
            UPDATES.c.name == update.name
        )
        known = named.select_from(UPDATES.join(ACCOUNTS, ACCOUNTS.c.id == UPDATES.c.account))
        if update.name is not None and (row := connection.execute(known).first()):
            if row.public_key != update.account.public_key:
                named_twice = f"a second update {update.name!r:.80}"
                raise UsageError(
                    named_twice, wanted="a name for each", do="name it after its proof"
                )
            # Perhaps under another build, where a validator was stopped after this and its pins
            # were changed.
            return self._standing(connection, row.account)
        account = _insert_account(connection, update.account)
        state = self._state(connection, account)
        count, previous = self._head(connection)
        law = _insert_law(connection, dumps(update.noise.as_dict()))
        each = sa.func.json_each(UPDATES.c.entry, "$.nonces").table_valued("value")
        same = (UPDATES.c.account == account) & (UPDATES.c.round == update.round)
        seen = sa.select(each.c.value).select_from(UPDATES.join(each, sa.true())).where(same)
        excluded = find_repeated(update.nonces, set(connection.execute(seen).scalars()))
        place = {"seq": count + 1, "previous": previous, "time": time.time()}
        entry = make_entry(
            update, law=law, excluded=excluded, fault=None, outcome=Evidence(), **place
        )
        # The noise is read back from the law, as an audit reads it.
        entry = state.take(entry, read_noise(connection, law))
        made = _insert_entry(connection, account, entry, entry.line)
        kept = connection.execute(sa.select(UPDATES).where(UPDATES.c.seq == entry.seq)).first()
        if (
            kept is None
            or kept._mapping != made
            or self._head(connection) != (entry.seq, made["hash"])
        ):
            raise damaged(
                self.path, f"entry {entry.seq} is not there as it was written", flag="--ledger"
            )
        return self._standing(connection, account)

    def _state(self, connection: sa.Connection, account: int) -> AccountState:
        """Return the state of an account after its last entry, which another process may have
        written.
        """
        state = self._states.setdefault(account, AccountState(self.genesis))
        self._states.move_to_end(account)
        if len(self._states) > LIVES:
            self._states.popitem(last=False)
        for entry in self._entries(
            connection, (UPDATES.c.account == account) & (UPDATES.c.seq > state.last)
        ):
            state.take(entry, read_noise(connection, entry.law))
        return state

    def _entries(
        self, connection: sa.Connection, chosen: sa.ColumnElement[bool]
    ) -> Iterator[Entry]:
        query = sa.select(UPDATES.c.seq, UPDATES.c.entry).where(chosen).order_by(UPDATES.c.seq)
        for seq, text in connection.execute(query, execution_options={"yield_per": AT_ONCE}):
            try:
                yield Entry.parse(text_of(text), f"{self.path}, entry {seq!r:.20}")
            except AssayError as error:
                raise DataError(error.seen, wanted=error.wanted, do=self._find_change) from None

    def accounts(self) -> list[Account]:
        """Return all accounts, in the order in which their lives began."""
        with self._db.read() as connection:
            found = connection.execute(sa.select(*OF_ACCOUNT).order_by(ACCOUNTS.c.id))
            return [Account(**row._mapping) for row in found]

    def standing(self, account: Account) -> Standing | None:
        """Return what the ledger says of an account, or None where it has no entry."""
        with self._db.read() as connection:
            found = connection.execute(select_account(account)).scalar()
            return None if found is None else self._standing(connection, found)

    def standings(self) -> Iterator[Standing]:
        """Iterate over the standing of every account, in the order in which their lives began."""
        with self._db.read() as connection:
            for (account,) in connection.execute(
                sa.select(ACCOUNTS.c.id).order_by(ACCOUNTS.c.id)
            ).all():
                yield self._standing(connection, account)

    def entries(self, account: Account) -> Iterator[Entry]:
        """Iterate over the entries of an account, the oldest first."""
        with self._db.read() as connection:
            yield from self._entries(
                connection, UPDATES.c.account == select_account(account).scalar_subquery()
            )

    def _standing(self, connection: sa.Connection, account: int) -> Standing:
        own = UPDATES.c.account == account
        ends = [
            sa.select(of(UPDATES.c.seq)).where(own).scalar_subquery()
            for of in (sa.func.min, sa.func.max)
        ]
        entries = list(self._entries(connection, UPDATES.c.seq.in_(ends)))
        if not entries:
            raise DataError(
                f"{self.path}: an account without entries",
                wanted="all of them",
                do=self._find_change,
            )
        begun = entries[0]
        now = entries[-1]
        return Standing(
            account=now.account,
            evidence=now.evidence,
            audits=now.outcome.audits,
            recorded=now.outcome.recorded,
            begun=begun.time,
            last=now.time,
            fault=now.fault,
        )

    def export(self, path: str | Path, *, overwrite: bool = False) -> tuple[int, str]:
        """Write everything that an audit elsewhere needs as JSON Lines; return the head.

        A UsageError refuses a file that exists where ``overwrite`` is not set. A file that cannot
        be written is a StorageError.
        """
        with PartialFile(Path(path), overwrite=overwrite) as out, self._db.read() as connection:
            out.restart()
            for line in _export_lines(connection):
                out.append_lines([line])
            out.commit()
            count, hash = connection.execute(sa.select(LEDGER.c.count, LEDGER.c.hash)).one()
            return int(count), str(hash)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __exit__(self, *error: object) -> None:
        self.close()


def check_ledger(
    path: Path, *, alpha: float | None = None, beta: float | None = None, read_only: bool = False
) -> None:
    """Refuse a path with something other than a ledger, or one that was begun at other error rates,
    before any write.

    Raises:
        UsageError: The file is no ledger, was begun at other error rates, or does not exist and is
            only to be read.
        StorageError: It cannot be read, or is no SQLite file, or a table of the ledger is missing.
    """
    regular = path.is_file()
    flag = FLAG[read_only]  # SQLite waits without end for a pipe
    found = table_names(path, flag=flag) if regular else set()
    if LEDGER.name not in found and (found or read_only or (path.exists() and not regular)):
        do = (
            "pass its path"
            if read_only
            else "name such a file with --ledger, or one that is not there yet"
        )
        raise UsageError(
            f"no ledger at {path}", wanted="a file that `assay poc verify --ledger` began", do=do
        )
    if found and (missing := {table.name for table in (LEDGER, LAWS, ACCOUNTS, UPDATES)} - found):
        # Anything may stand in its place, such as a view without an end.
        raise damaged(path, f"the table {min(missing)} is missing", flag=flag)
    if LEDGER.name in found and (alpha, beta) != (None, None):
        Ledger(path, alpha=alpha, beta=beta).close()


def find_repeated(nonces: Sequence[int], seen: Collection[int]) -> list[tuple[int, str]]:
    """Return the places of nonces that do not count, because they were seen in the round before,
    with the reason.
    """
    before = set(seen)
    found = []
    for place, nonce in enumerate(nonces):
        if nonce in before:
            found.append((place, REPEATED))
        before.add(nonce)
    return found


@dataclass(frozen=True)
class Source:
    """A ledger to read, in its own database, or an export in a temporary one with the line that it
    ends with.
    """

    path: Path
    database: Database
    stated: str | None

    def audit(self, head: str | None = None) -> LedgerAudit:
        """Audit the chain, in which a published hash must be, and all that the file defines."""
        with self.database.read() as connection:
            changes = schema_changes(connection.exec_driver_sql(SCHEMA), MIGRATIONS)
            faults = [Fault(entry=None, reason=change) for change in changes]
            if any(change.startswith("the table") for change in changes):
                # Anything may stand in its place, such as a view without an end.
                return LedgerAudit(
                    entries=0, accounts=0, head="", published=head, faults=tuple(faults)
                )
            chain = _Chain(connection, head)
            faults = [
                *chain.faults,
                *_wrong_outcomes(connection, chain),
                *faults,
                *_beside_entries(connection),
            ]
            if head is not None and not chain.found:
                seen = (
                    f"the published head {head} is not in the chain: entries were rewritten or "
                    f"cut off since"
                )
                faults.append(Fault(entry=None, reason=seen))
            if not faults and self.stated not in (None, _head_line(chain.entries, chain.hash)):
                faults.append(
                    Fault(
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


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Open a ledger or an export of one to read, which stays as it is; a DataError names a line of
    neither.
    """
    is_ledger = next(read_lines(path), (1, b""))[1].startswith(MAGIC)
    if is_ledger and LEDGER.name not in table_names(path, flag="ledger"):
        raise _bad(str(path), "a database without a ledger")
    with tempfile.TemporaryDirectory(prefix="assay-ledger-") as folder:
        database = _open(path, read_only=True) if is_ledger else _open(Path(folder, "copy.sqlite3"))
        try:
            yield Source(path, database, None if is_ledger else _read_export(path, database))
        finally:
            database.close()


def audit_ledger(path: str | Path, *, head: str | None = None) -> LedgerAudit:
    """Audit a ledger or an export of one, which stays as it is: every hash, every place and every
    verdict.

    ``head`` is the hash of a head that was published once; entries up to it must still be there.

    Raises:
        UsageError: The head cannot be one.
        DataError: The file is neither.
        StorageError: The file cannot be read.
    """
    if head is not None and (len(head) != 64 or set(head) - set("0123456789abcdef")):
        seen = f"--head {head:.80}"
        do = "give the hash that was published"
        raise UsageError(seen, wanted="64 hexadecimal digits, in lower case", do=do)
    with open_source(Path(path)) as source:
        return source.audit(head)


def _open(path: Path, *, read_only: bool = False, flag: str = "ledger") -> Database:
    return Database(
        path.parent,
        name=path.name,
        migrations=MIGRATIONS,
        exclusive=False,
        read_only=read_only,
        flag=flag,
    )


def _export_lines(connection: sa.Connection) -> Iterator[str]:
    """Yield the lines of an export."""
    genesis, count, hash = connection.execute(
        sa.select(LEDGER.c.genesis, LEDGER.c.count, LEDGER.c.hash)
    ).one()
    yield text_of(genesis)
    query = sa.select(UPDATES.c.law, UPDATES.c.entry, LAWS.c.law.label("text"))
    known = set[str]()
    query = query.select_from(UPDATES.outerjoin(LAWS, LAWS.c.hash == UPDATES.c.law)).order_by(
        UPDATES.c.seq
    )
    for law, entry, text in connection.execute(query, execution_options={"yield_per": AT_ONCE}):
        if law not in known:
            yield f'{{"law":{text_of(text)}}}'
        known.add(law)
        yield text_of(entry)
    yield _head_line(count, hash)


def _head_line(count: int, hash: str) -> str:
    return dumps({"head": {"count": count, "hash": hash}})


def _read_export(path: Path, database: Database) -> str:
    """Fill an empty ledger from an export, which must be what it would write; return the last line,
    its head.
    """
    first, *_ = next(_lines_of(path), ("", ""))
    with database.write() as connection:
        _insert_genesis(connection, Genesis.parse(first, f"{path}, line 1"))
        for text, source in islice(_lines_of(path), 1, None):
            if text.startswith('{"law":'):
                _insert_law(connection, text[7:-1])
            elif not text.startswith('{"head":'):
                entry = Entry.parse(text, source)
                try:
                    _insert_entry(
                        connection, _insert_account(connection, entry.account), entry, text
                    )
                except sa.exc.IntegrityError as error:
                    reason = (
                        f"a law that no line before it gives, or a name given twice ({error.orig})"
                    )
                    raise _bad(source, reason) from None
        for found, wanted in zip_longest(_lines_of(path), _export_lines(connection)):
            text, source = found or ("", f"{path}, the end")
            if text != wanted and not (
                wanted and text.startswith(start := '{"head":') and wanted.startswith(start)
            ):
                raise _bad(
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
            raise _bad(f"{path}, line {number}", "bytes that are not UTF-8") from None


def _insert_genesis(connection: sa.Connection, genesis: Genesis) -> None:
    connection.execute(
        LEDGER.insert().values(id=1, genesis=genesis.line, count=0, hash=genesis.hash)
    )


def _insert_law(connection: sa.Connection, law: str) -> str:
    connection.execute(LAWS.insert().prefix_with("OR IGNORE").values(hash=sha256(law), law=law))
    return sha256(law)


def _insert_account(connection: sa.Connection, account: Account) -> int:
    connection.execute(ACCOUNTS.insert().prefix_with("OR IGNORE").values(**vars(account)))
    return int(connection.execute(select_account(account)).scalar_one())


def _insert_entry(
    connection: sa.Connection, account: int, entry: Entry, text: str
) -> dict[str, Any]:
    """Write the next entry and count the head up; return the row, with the place that the ledger
    has for it.
    """
    seq = sa.select(LEDGER.c.count + 1).scalar_subquery()
    hash = sha256(text)
    row = {
        "account": account,
        "round": entry.round,
        "name": entry.name,
        "law": entry.law,
        "entry": text,
        "hash": hash,
    }
    connection.execute(UPDATES.insert().values(row | {"seq": seq}))
    connection.execute(LEDGER.update().values(count=LEDGER.c.count + 1, hash=hash))
    return row | {"seq": entry.seq}


def _bad(source: str, reason: str) -> DataError:
    do = "ask for the file again, or write one with `assay poc ledger export`"
    return DataError(f"{source}: {reason}", wanted="a ledger, or an export of one", do=do)
