"""The ledger of nodes' lives: one append-only SQLite file with an entry for every audit."""

import math
import secrets
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path

import sqlalchemy as sa

from assay.errors import AssayError, DataError, UsageError
from assay.files.jsonl import dumps
from assay.files.sqlite_connections import damaged
from assay.files.sqlite_schema import SCHEMA, schema_changes, table_names
from assay.files.storage import PartialFile
from assay.poc.verdict.entries import (
    REPEATED,
    Account,
    AccountEvidence,
    Entry,
    Genesis,
    LedgerUpdate,
    Standing,
    make_entry,
    round_identity,
)
from assay.poc.verdict.ledger_tables import (
    ACCOUNTS,
    AT_ONCE,
    FLAG,
    LAWS,
    LEDGER,
    MIGRATIONS,
    OF_ACCOUNT,
    UPDATES,
    find_account,
    insert_account,
    insert_entry,
    insert_genesis,
    insert_law,
    open_database,
    read_noise,
    text_of,
)
from assay.poc.verdict.life import Life
from assay.poc.verdict.proof_judge import ProofVerdict
from assay.poc.verdict.response_noise import AnyNoise, ResponseBlocks
from assay.poc.verdict.sample_plan import ALPHA, BETA

# Accounts kept in memory; others are rebuilt from their entries when they are needed.
LIVES = 1024


class AccountState:
    """The life of one account of a ledger, which takes its entries one after the other."""

    def __init__(self, genesis: Genesis, *, one_unit: bool = False) -> None:
        self.life = Life(alpha=genesis.alpha, beta=genesis.beta, one_unit=one_unit)
        self.audits = self.recorded = self.last = 0

    def take(self, entry: Entry, noise: AnyNoise) -> Entry:
        """Take an entry's counting residuals; return it with its fault and outcome."""
        self.audits = self.audits + 1
        self.recorded = self.recorded + len(entry.nonces)
        self.last = entry.seq
        evidence = take_entry(self.life, entry, noise).evidence
        outcome = evidence.model_copy(update={"audits": self.audits, "recorded": self.recorded})
        return entry.model_copy(update={"outcome": outcome, "fault": evidence.faulty_places})


def take_entry(life: Life, entry: Entry, noise: AnyNoise) -> Life:
    """Give a life the residuals of an entry that count, with their block and places."""
    repeated = {place for place, _ in entry.excluded}
    if entry.of_response:
        blocks = ResponseBlocks.parse(entry.residuals, entry.profiles)
        return life.update(noise, blocks.without(repeated))
    counted = [place for place in range(len(entry.nonces)) if place not in repeated]
    values = [entry.residuals[place] for place in counted]
    positions = entry.positions or entry.nonces
    return life.update(
        noise,
        [math.nan if value is None else value for value in values],
        block=entry.block_hash,
        positions=[positions[place] for place in counted],
        batch_size=entry.batch_size,
    )


class Ledger(AbstractContextManager["Ledger"]):
    """The evidence of every audit, one e-process per account, durable before it is acknowledged.

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
        self._db = open_database(self.path, read_only=read_only, flag=FLAG[read_only])
        self._appending = threading.Lock()
        self._state_of = lru_cache(maxsize=LIVES)(lambda _: AccountState(self.genesis))
        try:
            if not read_only:
                self._begin(ALPHA if alpha is None else alpha, BETA if beta is None else beta)
            with self._db.read() as connection:
                text = text_of(connection.execute(sa.select(LEDGER.c.genesis)).scalar())
            self.genesis = Genesis.parse(text, f"{self.path}, the beginning")
            for name, rate in (("alpha", alpha), ("beta", beta)):
                begun = getattr(self.genesis, name)
                if rate is not None and rate != begun:
                    raise UsageError(
                        f"{name} {rate:g} for the ledger {self.path}",
                        wanted=f"{begun:g}, at which it was begun: a life has one error rate",
                        do=f"pass --{name} {begun:g} (ASSAY_{name.upper()} to a service), or begin "
                        f"another ledger",
                    )
        except BaseException:
            self.close()
            raise

    def _begin(self, alpha: float, beta: float) -> None:
        with self._write() as connection:
            if connection.execute(sa.select(LEDGER.c.id)).first() is None:
                if not (0 < alpha < 1 and 0 < beta < 1):
                    raise UsageError(
                        f"alpha {alpha}, beta {beta}",
                        wanted="two rates in (0, 1)",
                        do="pass --alpha 0.001",
                    )
                genesis = Genesis(
                    id=secrets.token_hex(16), created=time.time(), alpha=alpha, beta=beta
                )
                insert_genesis(connection, genesis)

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
        """Number of entries, and the hash of the chain: publish it for later audits."""
        with self._db.read() as connection:
            return self._head(connection)

    def contains(self, count: int, hash: str) -> bool:
        """Return whether this was once the :attr:`head`, so that no earlier entry is missing."""
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
            raise DataError(
                f"{self.path}: its head says {count!r:.20} entries, and the last one is "
                f"{last[0]!r:.20}",
                wanted="a ledger that nothing but assay has written to",
                do=self._find_change,
            )
        return int(count), str(hash)

    def record(
        self, verdict: ProofVerdict, *, proof: str | None = None, build: str | None = None
    ) -> Standing:
        """Add the evidence of a verdict; return the standing of the node's life.

        ``proof`` is the SHA-256 in the footer of the proof, and ``build`` the name of the prover's
        build. When None, it is that of the pinned build of its fingerprint, or the number format
        where none is pinned: anything else in a fingerprint is the prover's word, and a new word
        must not begin a new life.
        """
        header = verdict.header
        noise = verdict.noise
        if noise is None:
            raise UsageError(
                f"a verdict without a law: {verdict.reason}",
                wanted="a verdict by a measured law, without which an audit says nothing of a life",
                do="verify the proof again with a calibration",
            )
        account = Account(
            public_key=header.round.public_key,
            digest=header.digest,
            build=verdict.pins.build_of(header.fingerprint) if build is None else build,
            preset=header.pipeline.name,
        )
        update = LedgerUpdate(
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

    def append(self, updates: Iterable[LedgerUpdate]) -> list[Standing]:
        """Add the evidence of audits atomically; return the standing of each account.

        Raises:
            UsageError: A value is out of range.
            DataError: The ledger was changed by something else; an audit names the place.
            StorageError: The entries are not on disk, and nothing has changed. So it is where the
                file defines more, less or else than a ledger does, or an entry that is read back is
                not the one that was written.
        """
        all_updates = [*updates]
        with self._appending:
            try:
                # Other processes wait seconds at most for a write, and a life may take longer to
                # replay. Inside, only what they have added since is.
                with self._db.read() as connection:
                    for account in {update.account for update in all_updates}:
                        if (number := find_account(connection, account)) is not None:
                            self._state(connection, number)
                with self._write() as connection:
                    return [self._add(connection, update) for update in all_updates]
            except BaseException:
                # What is in memory may hold values that are not on disk: it is rebuilt when it is
                # needed.
                self._state_of.cache_clear()
                raise

    def _add(self, connection: sa.Connection, update: LedgerUpdate) -> Standing:
        named_before = (
            sa.select(UPDATES.c.account, ACCOUNTS.c.public_key)
            .select_from(UPDATES.join(ACCOUNTS, ACCOUNTS.c.id == UPDATES.c.account))
            .where(UPDATES.c.name == update.name)
        )
        if update.name is not None and (row := connection.execute(named_before).first()):
            if row.public_key != update.account.public_key:
                raise UsageError(
                    f"a second update {update.name!r:.80}",
                    wanted="a name for each",
                    do="name it after its proof",
                )
            # Perhaps under another build, where a validator was stopped after this and its pins
            # were changed.
            return self._standing(connection, row.account)
        account = insert_account(connection, update.account)
        state = self._state(connection, account)
        count, previous = self._head(connection)
        law = insert_law(connection, dumps(update.noise.as_dict()))
        round_entries = sa.func.json_each(UPDATES.c.entry, "$.nonces").table_valued("value")
        seen = (
            sa.select(round_entries.c.value)
            .select_from(UPDATES.join(round_entries, sa.true()))
            .where((UPDATES.c.account == account) & (UPDATES.c.round == update.round))
        )
        excluded = find_repeated(update.nonces, set(connection.execute(seen).scalars()))
        entry = make_entry(
            update,
            law=law,
            excluded=excluded,
            fault=None,
            outcome=AccountEvidence(),
            seq=count + 1,
            previous=previous,
            time=time.time(),
        )
        # The noise is read back from the law, as an audit reads it.
        entry = state.take(entry, read_noise(connection, law))
        row_written = insert_entry(connection, account, entry, entry.line)
        row_read = connection.execute(sa.select(UPDATES).where(UPDATES.c.seq == entry.seq)).first()
        if (
            row_read is None
            or row_read._mapping != row_written
            or self._head(connection) != (entry.seq, row_written["hash"])
        ):
            raise damaged(
                self.path, f"entry {entry.seq} is not there as it was written", flag="--ledger"
            )
        return self._standing(connection, account)

    def _state(self, connection: sa.Connection, account: int) -> AccountState:
        """Return the state of an account after its last entry, which another process may have
        written.
        """
        state = self._state_of(account)
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
            rows = connection.execute(sa.select(*OF_ACCOUNT).order_by(ACCOUNTS.c.id))
            return [Account(**row._mapping) for row in rows]

    def standing(self, account: Account) -> Standing | None:
        """Return what the ledger says of an account, or None where it has no entry."""
        with self._db.read() as connection:
            number = find_account(connection, account)
            return None if number is None else self._standing(connection, number)

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
            number = find_account(connection, account)
            yield from self._entries(connection, UPDATES.c.account == number)

    def _standing(self, connection: sa.Connection, account: int) -> Standing:
        of_account = UPDATES.c.account == account
        ends = [
            sa.select(of(UPDATES.c.seq)).where(of_account).scalar_subquery()
            for of in (sa.func.min, sa.func.max)
        ]
        entries = list(self._entries(connection, UPDATES.c.seq.in_(ends)))
        if not entries:
            raise DataError(
                f"{self.path}: an account without entries",
                wanted="all of them",
                do=self._find_change,
            )
        now = entries[-1]
        return Standing(
            account=now.account,
            evidence=now.evidence,
            audits=now.outcome.audits,
            recorded=now.outcome.recorded,
            begun=entries[0].time,
            last=now.time,
            fault=now.fault,
        )

    def export(self, path: str | Path, *, overwrite: bool = False) -> tuple[int, str]:
        """Write everything that an audit elsewhere needs as JSON Lines; return the head.

        A UsageError refuses the ledger itself, and a file that exists where ``overwrite`` is not
        set. A file that cannot be written is a StorageError.
        """
        if Path(path).exists() and self.path.samefile(path):
            raise UsageError(
                f"an export to {path}, the ledger itself",
                wanted="another file: an export cannot be added to",
                do="choose another name with --output",
            )
        with PartialFile(Path(path), overwrite=overwrite) as out, self._db.read() as connection:
            out.restart()
            for line in export_lines(connection):
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
    """Refuse a path that is no ledger, or a ledger with other error rates, before any write.

    Raises:
        UsageError: The file is no ledger, was begun at other error rates, or does not exist and is
            only to be read.
        StorageError: It cannot be read, or is no SQLite file, or a table of the ledger is missing.
    """
    regular = path.is_file()
    # SQLite waits without end for a pipe.
    flag = FLAG[read_only]
    names = table_names(path, flag=flag) if regular else set()
    if LEDGER.name not in names and (names or read_only or (path.exists() and not regular)):
        do = (
            "pass its path"
            if read_only
            else "name such a file with --ledger, or one that is not there yet"
        )
        raise UsageError(
            f"no ledger at {path}", wanted="a file that `assay poc verify --ledger` began", do=do
        )
    if names and (missing := {table.name for table in (LEDGER, LAWS, ACCOUNTS, UPDATES)} - names):
        # Anything may stand in its place, such as a view without an end.
        raise damaged(path, f"the table {min(missing)} is missing", flag=flag)
    if LEDGER.name in names and (alpha, beta) != (None, None):
        Ledger(path, alpha=alpha, beta=beta).close()


def find_repeated(nonces: Sequence[int], recorded: Collection[int]) -> list[tuple[int, str]]:
    """Return the places of nonces that counted before in the round, with the reason."""
    before = set(recorded)
    repeated = []
    for place, nonce in enumerate(nonces):
        if nonce in before:
            repeated.append((place, REPEATED))
        before.add(nonce)
    return repeated


def export_lines(connection: sa.Connection) -> Iterator[str]:
    """Yield the lines of an export."""
    genesis, count, hash = connection.execute(
        sa.select(LEDGER.c.genesis, LEDGER.c.count, LEDGER.c.hash)
    ).one()
    yield text_of(genesis)
    written = set[str]()
    query = (
        sa.select(UPDATES.c.law, UPDATES.c.entry, LAWS.c.law.label("text"))
        .select_from(UPDATES.outerjoin(LAWS, LAWS.c.hash == UPDATES.c.law))
        .order_by(UPDATES.c.seq)
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
