"""The outbox: callbacks that are owed, written in the transaction of the results that they announce.

A row of kind ``generated`` does not hold a body. It names a run of nonces of its round, and the body is made from
the records when it is sent; records never change, so a row always gives the same body under the same id. A row of kind
``receipts`` names a run of sequence numbers in the same way; receipts that were deleted are missing from its body.
"""

import base64
import itertools
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from assay.errors import UsageError
from assay.files.database import Database
from assay.files.jsonl import JsonObject, dumps, loads
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.protocol.proof import describe_packing
from assay.poc.service.database import FILE, open_database

OWED = ("open", "pending")
RECEIPTS = "receipts"
"""The kind of callbacks that announce receipts, and the last part of the path to which they are posted."""


@dataclass(frozen=True)
class Callback:
    """A row of the table ``outbox``, without the body."""

    id: str
    round_id: int | None
    kind: str
    url: str
    first_nonce: int | None
    last_nonce: int | None
    nonces: int
    status: str
    created_at: float
    attempts: int
    next_attempt_at: float
    last_error: str | None
    finished_at: float | None


class Outbox:
    """Reads and writes the table of callbacks."""

    def __init__(self, database: Database) -> None:
        self.notify: Callable[[], object] = lambda: None
        """Is called, in the thread that wrote, whenever callbacks may be due."""
        self._db, self._table = database, database["outbox"]
        self._c = self._table.c
        self._columns = [self._c[field.name] for field in fields(Callback)]

    def announce(
        self, connection: sa.Connection, round_id: int, url: str, nonces: Sequence[int], *, interval: float, most: int
    ) -> None:
        """Owe ``/generated`` callbacks for valid nonces of a round: extend the open one, or open others.

        No callback announces more than twice ``most`` nonces.
        """
        for start in range(0, len(nonces), most):
            part = nonces[start : start + most]
            row = self._collecting(connection, round_id, "generated", url, part[0])
            self._extend(connection, row, part, interval=interval, most=most)

    def announce_receipts(
        self, connection: sa.Connection, url: str, stored: Sequence[tuple[int, int]], *, interval: float, most: int
    ) -> None:
        """Owe callbacks for receipts that were stored, as sequence number and header of each, in order.

        One callback has up to ``most`` receipts of one header.
        """
        for header, group in itertools.groupby(stored, key=lambda each: each[1]):
            numbers = [seq for seq, _ in group]
            while numbers:
                row = self._collecting(connection, None, RECEIPTS, url, numbers[0], header)
                part = numbers[: max(1, most - row.nonces)]
                self._extend(connection, row, part, interval=interval, most=most)
                del numbers[: len(part)]

    def _collecting(
        self,
        connection: sa.Connection,
        round_id: int | None,
        kind: str,
        url: str,
        first: int,
        header: int | None = None,
    ) -> sa.Row[Any]:
        """Return the open callback of a kind, for receipts of one header, or a new one that begins with ``first``."""
        c, receipts = self._c, self._db["receipts"].c
        is_open = (c.round_id.is_not_distinct_from(round_id)) & (c.kind == kind) & (c.status == "open")
        row = connection.execute(sa.select(*self._columns).where(is_open)).first()
        if row is not None and row.url == url:
            last = sa.select(receipts.header_id).where(receipts.seq == row.last_nonce)
            if header is None or connection.execute(last).scalar() == header:
                return row
        connection.execute(self._table.update().where(is_open).values(status="pending"))
        return self._insert(connection, round_id, kind, url, status="open", first_nonce=first)

    def _extend(
        self, connection: sa.Connection, row: sa.Row[Any], part: Sequence[int], *, interval: float, most: int
    ) -> None:
        """Add nonces or receipts to an open callback, and release it where it is full or old enough."""
        count = row.nonces + len(part)
        due = count >= most or abs(time.time() - row.created_at) >= interval
        values = {"last_nonce": part[-1], "nonces": count, "status": "pending" if due else "open"}
        connection.execute(self._table.update().where(self._c.id == row.id).values(values))

    def forget_receipts(self, connection: sa.Connection) -> None:
        """Owe no callback for receipts that were all deleted."""
        receipts, c = self._db["receipts"].c, self._c
        left = sa.exists().where(receipts.seq.between(c.first_nonce, c.last_nonce))
        connection.execute(self._table.delete().where(c.kind == RECEIPTS, ~left))

    def add(self, connection: sa.Connection, round_id: int | None, kind: str, url: str, body: JsonObject) -> None:
        """Owe a callback with a body of its own."""
        self._insert(connection, round_id, kind, url, status="pending", body=dumps(body))

    def _insert(
        self, connection: sa.Connection, round_id: int | None, kind: str, url: str, **values: object
    ) -> sa.Row[Any]:
        values |= {"id": f"msg_{uuid.uuid4().hex}", "round_id": round_id, "kind": kind, "url": url}
        values |= {"created_at": time.time(), "next_attempt_at": 0.0}
        return connection.execute(self._table.insert().values(values).returning(*self._columns)).one()

    def close_open(self, interval: float) -> None:
        """Release callbacks that have collected nonces for ``interval`` seconds."""
        age = sa.func.abs(time.time() - self._c.created_at)
        ripe = (self._c.status == "open") & (age >= interval)
        if self._db.scalar(sa.select(sa.exists().where(ripe))):
            self._db.change(self._table.update().where(ripe).values(status="pending"))

    def retry_now(self) -> None:
        """Forget the pauses of pending callbacks: the clock may have been set back since they were written."""
        self._db.change(self._table.update().where(self._c.status == "pending").values(next_attempt_at=0.0))

    def due(self, limit: int, *, besides: Iterable[str] = ()) -> list[tuple[Callback, str]]:
        """Return up to ``limit`` callbacks whose time has come, the oldest first, with their bodies."""
        c, found = self._c, []
        ready = (c.status == "pending") & (c.next_attempt_at <= time.time()) & c.id.not_in(list(besides))
        query = sa.select(*self._columns, c.body).where(ready).order_by(c.next_attempt_at, c.seq).limit(limit)
        with self._db.read() as connection:
            for *values, body in connection.execute(query):
                callback = Callback(*values)
                make = self._receipts if callback.kind == RECEIPTS else self._generated
                found.append((callback, body or dumps(make(connection, callback))))
        return found

    def _receipts(self, connection: sa.Connection, callback: Callback) -> JsonObject:
        """Return what a receiver has to know of receipts in order to fetch them, and to see that they stay the same."""
        c, headers = self._db["receipts"].c, self._db["receipt_headers"].c
        query = sa.select(headers.text, c.seq, c.request_id, c.choice.label("index"), c.block_hash, c.tokens, c.sha256)
        run = c.seq.between(callback.first_nonce, callback.last_nonce) & (headers.id == c.header_id)
        rows = [dict(row._mapping) for row in connection.execute(query.where(run).order_by(c.seq))]
        header = loads(rows[0]["text"], "header of receipts") if rows else {}
        receipts = [
            {name: value for name, value in row.items() if name != "text"} | {"sha256": row["sha256"].hex()}
            for row in rows
        ]
        return {"public_key": header.get("public_key"), "model": header.get("model"), "receipts": receipts}

    def _generated(self, connection: sa.Connection, callback: Callback) -> JsonObject:
        records, rounds = self._db["records"], self._db["rounds"]
        round = connection.execute(sa.select(rounds).where(rounds.c.id == callback.round_id)).one()
        run = records.c.nonce.between(callback.first_nonce, callback.last_nonce)
        query = sa.select(records).where(records.c.round_id == callback.round_id, run, records.c.valid == 1)
        found = connection.execute(query.order_by(records.c.nonce)).all()
        body = {name: getattr(round, name) for name in ("public_key", "block_hash", "block_height", "node_id")}
        if found and found[0].vector is not None:
            artifacts = [{"nonce": r.nonce, "vector_b64": base64.b64encode(r.vector).decode()} for r in found]
            return body | {"artifacts": artifacts, "encoding": describe_packing(get_pipeline(round.preset))}
        nonces, distances = [r.nonce for r in found], [r.distance for r in found]
        return body | {"nonces": nonces, "dist": distances, "r_target": round.r_target}

    def attempted(self, callback_id: str, error: str | None, *, retry_in: float | None) -> None:
        """Record an attempt: a delivery where ``error`` is None, otherwise a failure.

        Another attempt follows a failure after ``retry_in`` seconds; if that is None, the callback is a dead letter.
        """
        now = time.time()
        if error is None or retry_in is None:
            values: dict[str, object] = {"status": "delivered" if error is None else "dead", "finished_at": now}
        else:
            values = {"next_attempt_at": now + retry_in}
        values |= {"attempts": self._c.attempts + 1, "last_error": error}
        self._db.change(self._table.update().where(self._c.id == callback_id).values(values))

    def counts(self) -> dict[str, int]:
        """Return how many callbacks are pending (open ones included) and dead."""
        count, status = sa.select(sa.func.count()).select_from(self._table), self._c.status
        owed, dead = count.where(status.in_(OWED)), count.where(status == "dead")
        (row,) = self._db.rows(sa.select(owed.scalar_subquery().label("pending"), dead.scalar_subquery().label("dead")))
        return row._asdict()

    def owed(self, connection: sa.Connection, round_id: int | None) -> int:
        """Return how many callbacks of a round are undelivered; None asks for those of artifact jobs."""
        of_round = (self._c.round_id == round_id) & (self._c.kind != RECEIPTS)
        query = sa.select(sa.func.count()).where(self._c.status.in_(OWED), of_round)
        return int(connection.execute(query).scalar_one())

    def rows(self, statuses: Sequence[str], limit: int) -> list[Callback]:
        """Return the newest callbacks of some statuses."""
        query = sa.select(*self._columns).where(self._c.status.in_(statuses))
        return [Callback(**row._mapping) for row in self._db.rows(query.order_by(self._c.seq.desc()).limit(limit))]

    def replay(self, ids: Sequence[str] | None = None) -> int:
        """Make dead letters pending again, all or some; return how many."""
        dead = self._c.status == "dead"
        if ids is not None:
            dead &= self._c.id.in_(list(ids))
        fresh = {"status": "pending", "attempts": 0, "next_attempt_at": 0.0, "finished_at": None}
        return self._db.change(self._table.update().where(dead).values(fresh))

    def prune(self, keep: float) -> None:
        """Delete callbacks that were delivered more than ``keep`` seconds ago."""
        old = (self._c.status == "delivered") & (self._c.finished_at < time.time() - keep)
        self._db.change(self._table.delete().where(old))


@contextmanager
def open_outbox(data_dir: Path) -> Iterator[Outbox]:
    """Open the outbox of a service, which may be running."""
    if not (data_dir / FILE).is_file():
        seen, wanted = f"no database in {data_dir}", "the data directory of a service"
        raise UsageError(seen, wanted=wanted, do="pass its --data-dir")
    with closing(open_database(data_dir, exclusive=False)) as database:
        yield Outbox(database)
