"""The ledger of nodes' lives: one SQLite file, to which every audit adds an entry, and from which none is taken."""

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa

from assay.errors import AssayError, DataError, UsageError
from assay.poc.verdict._judge import Verdict
from assay.poc.verdict._ledger_audit import AT_ONCE, text_of
from assay.poc.verdict._ledger_entries import (
    NOTHING,
    REMEMBERED,
    Account,
    Entry,
    Genesis,
    Progress,
    Standing,
    Update,
    aside_reasons,
    excluded_places,
    lasting_fault,
    make_entry,
    round_identity,
    sha256,
)
from assay.poc.verdict._ledger_files import export_ledger
from assay.poc.verdict._ledger_schema import ACCOUNTS, LAWS, LEDGER, MIGRATIONS, UPDATES, number_of
from assay.poc.verdict._response_noise import AnyNoise, noise_from_dict
from assay.reports import dumps, loads
from assay.reports.database import Database, damaged, tables

ALPHA, BETA = 1e-3, 1e-2  # of a new ledger
LIVES = 4096  # accounts kept in memory; others are rebuilt from their entries when they are needed
ROUNDS = 1024  # sets of nonces of an account in a round, likewise


class Ledger:
    """The evidence of every audit of every node, one e-process per account, on disk before anything is acknowledged.

    Several processes may write to one file. A nonce counts once per account and round: of a proof that is checked
    twice, the nonces that were checked before are recorded and do not count.

    Args:
        path: File of the ledger. It is created if it does not exist.
        alpha: Bound on the chance that an honest node is ever accused, in its whole life; that of the file when None,
            and .001 for a new one.
        beta: Bound on the chance that a cheater is called honest; that of the file when None, and .01 for a new one.
        read_only: Whether the file must exist and stay as it is.

    Raises:
        UsageError: The file is no ledger, or was begun at other error rates.
        StorageError: The file cannot be read or written.

    Example:
        >>> import assay
        >>> from assay.poc import Round
        >>> model = assay.load_model("reference:qwen3", device="cpu")
        >>> round = Round(block_hash="block_alpha", public_key="node_A", seq_len=16)
        >>> proof = assay.poc.prove(model, round, range(32))
        >>> with assay.poc.verdict.Ledger("ledger.sqlite3") as ledger:
        ...     for _ in range(2):
        ...         verdict = assay.poc.verify(proof, model, expect=round)
        ...         standing = ledger.record(verdict, proof=proof.footer.sha256)
        ...         print(standing.verdict, standing.audits, standing.recorded, standing.evidence.n)
        honest 1 32 32
        honest 2 64 32
    """

    def __init__(
        self, path: str | Path, *, alpha: float | None = None, beta: float | None = None, read_only: bool = False
    ) -> None:
        self.path = Path(path)
        self._find_change = f"find what was changed: assay poc ledger audit {path}"
        check_ledger(self.path, read_only=read_only)
        self._db = Database(
            self.path.parent,
            name=self.path.name,
            migrations=MIGRATIONS,
            exclusive=False,
            read_only=read_only,
            flag=_flag(read_only=read_only),
        )
        self._appending = threading.Lock()
        self._states: OrderedDict[int, Progress] = OrderedDict()
        self._seen: OrderedDict[tuple[int, str], tuple[int, set[int]]] = OrderedDict()
        self._noises: OrderedDict[str, AnyNoise] = OrderedDict()
        try:
            if not read_only:
                self._begin(ALPHA if alpha is None else alpha, BETA if beta is None else beta)
            self.genesis = self._read_genesis()
            for name, wanted in (("alpha", alpha), ("beta", beta)):
                begun = getattr(self.genesis, name)
                if wanted is not None and wanted != begun:
                    raise UsageError(
                        f"{name} {wanted:g} for the ledger {self.path}",
                        wanted=f"{begun:g}, at which it was begun: a life has one error rate",
                        do=f"pass --{name} {begun:g} (ASSAY_{name.upper()} to a service), or begin another ledger",
                    )
        except BaseException:
            self.close()
            raise

    def _begin(self, alpha: float, beta: float) -> None:
        with self._db.write() as connection:
            if connection.execute(sa.select(LEDGER.c.id)).first() is None:
                if not (0 < alpha < 1 and 0 < beta < 1):
                    raise UsageError(
                        f"alpha {alpha}, beta {beta}", wanted="two rates in (0, 1)", do="pass --alpha 0.001"
                    )
                made = Genesis(id=secrets.token_hex(16), created=time.time(), alpha=alpha, beta=beta)
                row = {"id": 1, "genesis": made.line, "count": 0, "hash": made.hash}
                connection.execute(LEDGER.insert().values(row))

    def _read_genesis(self) -> Genesis:
        with self._db.read() as connection:
            text = connection.execute(sa.select(LEDGER.c.genesis)).scalar()
        return Genesis.parse(text_of(text), f"{self.path}, the beginning")

    @property
    def head(self) -> tuple[int, str]:
        """Number of entries, and the hash that stands for all of them: publish it, and ``audit`` holds you to it."""
        with self._db.read() as connection:
            return self._head(connection)

    def _head(self, connection: sa.Connection) -> tuple[int, str]:
        count, hash = connection.execute(sa.select(LEDGER.c.count, LEDGER.c.hash)).one()
        query = sa.select(UPDATES.c.seq, UPDATES.c.hash).order_by(UPDATES.c.seq.desc()).limit(1)
        last = connection.execute(query).first() or (0, self.genesis.hash)
        if (count, hash) != tuple(last):
            raise DataError(
                f"{self.path}: its head says {count!r:.20} entries, and the last one is {last[0]!r:.20}",
                wanted="a ledger that nothing but assay has written to",
                do=self._find_change,
            )
        return int(count), str(hash)

    def record(self, verdict: Verdict, *, proof: str | None = None, build: str | None = None) -> Standing:
        """Add the evidence of a verdict, and return what the whole life of the node says now.

        Nonces at places of the batch that are faulty are recorded and do not count. Those at places that are suspected
        to be do not accuse, but the life is not honest against them.

        Args:
            verdict: Verdict on a sample of a proof.
            proof: SHA-256 of the proof: that of its footer.
            build: Name of the prover's build; when None, that of the pinned build that its fingerprint is of, or the
                number format where none is pinned. Everything else in a fingerprint is the prover's word, and a new
                word must not begin a new life.

        Raises:
            UsageError: A value is out of range.
            DataError: The ledger was changed by something else; an audit names the place.
            StorageError: The entry is not on disk, and nothing has changed.
        """
        header, places = verdict.header, verdict.places
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
            noise=verdict.noise,
            nonces=verdict.nonces,
            residuals=verdict.residuals,
            proof=proof,
            sample_seed=verdict.sample_seed,
            excluded=aside_reasons(verdict.nonces, places),
            fault=places.pattern if places.faulty else None,
        )
        return self.append([update])[0]

    def append(self, updates: Iterable[Update]) -> list[Standing]:
        """Add the evidence of audits, all or none of them; return the standing of the account after each.

        Raises:
            UsageError: A value is out of range.
            DataError: The ledger was changed by something else; an audit names the place.
            StorageError: The entries are not on disk, and nothing has changed.
        """
        with self._appending:
            try:
                with self._db.write() as connection:
                    return [self._add(connection, update) for update in updates]
            except BaseException:
                # What is in memory may hold values that are not on disk: it is rebuilt when it is needed.
                self._states.clear()
                self._seen.clear()
                raise

    def _add(self, connection: sa.Connection, update: Update) -> Standing:
        named = sa.select(UPDATES.c.account, ACCOUNTS.c.public_key).where(UPDATES.c.name == update.name)
        known = named.select_from(UPDATES.join(ACCOUNTS, ACCOUNTS.c.id == UPDATES.c.account))
        if update.name is not None and (row := connection.execute(known).first()):
            if row.public_key != update.account.public_key:
                raise UsageError(
                    f"a second update {update.name!r:.80}", wanted="a name for each", do="name it after its proof"
                )
            # Perhaps under another build, where a validator was stopped after this and its pins were changed.
            return self._standing(connection, row.account)
        account = self._account(connection, update.account)
        state, seen = self._state(connection, account), self._nonces(connection, account, update.round)
        count, previous = self._head(connection)
        law = dumps(update.noise.as_dict())
        connection.execute(LAWS.insert().prefix_with("OR IGNORE").values(hash=sha256(law), law=law))
        values: dict[str, Any] = {"seq": count + 1, "previous": previous, "time": time.time(), "law": sha256(law)}
        values |= {"excluded": excluded_places(update.nonces, seen, update.excluded), "outcome": NOTHING}
        entry = make_entry(update, values)
        # The noise is read back from the law, as an audit reads it.
        entry = entry.model_copy(update={"outcome": state.take(entry, self._noise(connection, entry.law))})
        columns = {"seq": entry.seq, "account": account, "round": entry.round, "name": entry.name, "law": entry.law}
        connection.execute(UPDATES.insert().values(columns | {"entry": entry.line, "hash": entry.hash}))
        connection.execute(LEDGER.update().values(count=entry.seq, hash=entry.hash))
        seen.update(entry.nonces)
        self._seen[account, update.round] = (entry.seq, seen)
        return self._standing(connection, account)

    def _account(self, connection: sa.Connection, account: Account) -> int:
        found = connection.execute(number_of(account)).scalar()
        if found is None:
            connection.execute(ACCOUNTS.insert().values(**vars(account)))
            found = connection.execute(number_of(account)).scalar_one()
        return int(found)

    def _state(self, connection: sa.Connection, account: int) -> Progress:
        """Return the state of an account after its last entry, of which another process may have written some."""
        state = self._states.setdefault(account, Progress(self.genesis))
        self._states.move_to_end(account)
        if len(self._states) > LIVES:
            self._states.popitem(last=False)
        for entry in self._entries(connection, (UPDATES.c.account == account) & (UPDATES.c.seq > state.last)):
            state.take(entry, self._noise(connection, entry.law))
        return state

    def _nonces(self, connection: sa.Connection, account: int, round: str) -> set[int]:
        """Return the nonces of a round that an account has entries of."""
        last, seen = self._seen.setdefault((account, round), (0, set()))
        self._seen.move_to_end((account, round))
        if len(self._seen) > ROUNDS:
            self._seen.popitem(last=False)
        same = (UPDATES.c.account == account) & (UPDATES.c.round == round)
        for entry in self._entries(connection, same & (UPDATES.c.seq > last)):
            seen.update(entry.nonces)
        return seen

    def _noise(self, connection: sa.Connection, law: str) -> AnyNoise:
        if law not in self._noises:
            text = text_of(connection.execute(sa.select(LAWS.c.law).where(LAWS.c.hash == law)).scalar())
            self._noises[law] = noise_from_dict(loads(text, f"{self.path}, law {law[:12]}"))
            if len(self._noises) > LIVES:
                self._noises.popitem(last=False)
        return self._noises[law]

    def _entries(self, connection: sa.Connection, chosen: sa.ColumnElement[bool]) -> Iterator[Entry]:
        query = sa.select(UPDATES.c.seq, UPDATES.c.entry).where(chosen).order_by(UPDATES.c.seq)
        for seq, text in connection.execute(query, execution_options={"yield_per": AT_ONCE}):
            try:
                yield Entry.parse(text_of(text), f"{self.path}, entry {seq!r:.20}")
            except AssayError as error:
                raise DataError(error.seen, wanted=error.wanted, do=self._find_change) from None

    def accounts(self) -> list[Account]:
        """Return all accounts, in the order in which their lives began."""
        names = [ACCOUNTS.c[name] for name in Account.__dataclass_fields__]
        with self._db.read() as connection:
            return [Account(**row._mapping) for row in connection.execute(sa.select(*names).order_by(ACCOUNTS.c.id))]

    def standing(self, account: Account) -> Standing | None:
        """Return what the ledger says of an account, or None where it has no entry."""
        with self._db.read() as connection:
            found = connection.execute(number_of(account)).scalar()
            return None if found is None else self._standing(connection, found)

    def standings(self) -> Iterator[Standing]:
        """Iterate over the standing of every account, in the order in which their lives began."""
        with self._db.read() as connection:
            for (account,) in connection.execute(sa.select(ACCOUNTS.c.id).order_by(ACCOUNTS.c.id)).all():
                yield self._standing(connection, account)

    def entries(self, account: Account, *, newest: int | None = None) -> Iterator[Entry]:
        """Iterate over the entries of an account, the oldest first.

        Args:
            account: Account.
            newest: Number of entries at the end; all when None.
        """
        with self._db.read() as connection:
            chosen = UPDATES.c.account == number_of(account).scalar_subquery()
            if newest is not None:
                last = sa.select(UPDATES.c.seq).where(chosen).order_by(UPDATES.c.seq.desc()).limit(newest)
                chosen = UPDATES.c.seq.in_(last)
            yield from self._entries(connection, chosen)

    def _standing(self, connection: sa.Connection, account: int) -> Standing:
        own = UPDATES.c.account == account
        first = sa.select(sa.func.min(UPDATES.c.seq)).where(own).scalar_subquery()
        last = sa.select(UPDATES.c.seq).where(own).order_by(UPDATES.c.seq.desc()).limit(REMEMBERED)
        entries = list(self._entries(connection, (UPDATES.c.seq == first) | UPDATES.c.seq.in_(last)))
        begun, now = entries[0], entries[-1]
        return Standing(
            account=now.owner,
            evidence=now.evidence,
            audits=now.outcome.audits,
            recorded=now.outcome.recorded,
            begun=begun.time,
            last=now.time,
            fault=lasting_fault(entries[-REMEMBERED:]),
        )

    def export(self, path: str | Path, *, overwrite: bool = False) -> tuple[int, str]:
        """Write everything that an audit elsewhere needs as JSON Lines; return the head.

        Args:
            path: File to write.
            overwrite: Whether a file of that name may be replaced.

        Raises:
            UsageError: The file exists and ``overwrite`` is not set.
            StorageError: It cannot be written.
        """
        return export_ledger(self._db, Path(path), overwrite=overwrite)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def check_ledger(path: Path, *, alpha: float | None = None, beta: float | None = None, read_only: bool = False) -> None:
    """Refuse a path at which there is something other than such a ledger, before anything is written to it.

    Args:
        path: File of the ledger.
        alpha: Rate of accusing an honest node at which a ledger that is there must have been begun; any when None.
        beta: Rate of passing a cheater, likewise.
        read_only: Whether the file must exist.

    Raises:
        UsageError: The file is no ledger, or was begun at other error rates.
        StorageError: It cannot be read, or is no SQLite file, or a table of the ledger is missing.
    """
    regular = path.is_file()  # SQLite waits without end for a pipe
    found = tables(path, flag=_flag(read_only=read_only)) if regular else set()
    if LEDGER.name not in found and (found or read_only or (path.exists() and not regular)):
        raise UsageError(
            f"no ledger at {path}",
            wanted="a file that `assay poc verify --ledger` began",
            do="pass its path" if read_only else "name such a file with --ledger, or one that is not there yet",
        )
    if found and (missing := {table.name for table in (LEDGER, LAWS, ACCOUNTS, UPDATES)} - found):
        # What stands in its place may be anything, such as a view without an end.
        raise damaged(path, f"the table {min(missing)} is missing", flag=_flag(read_only=read_only))
    if LEDGER.name in found and (alpha, beta) != (None, None):
        Ledger(path, alpha=alpha, beta=beta).close()


def _flag(*, read_only: bool) -> str:
    """Return what errors call the file: commands that only read a ledger have no flag for it."""
    return "ledger" if read_only else "--ledger"
