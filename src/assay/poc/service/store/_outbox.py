"""The outbox: callbacks that are owed, written in the transaction of the results that they announce.

A row of kind ``generated`` does not hold a body. It names a run of nonces of its round, and the body is made from
the records when it is sent; records never change, so a row always gives the same body under the same id.
"""

import base64
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from assay.errors import UsageError
from assay.poc.service.store._database import Database
from assay.reports import dumps

OWED = ("open", "pending")
_ENCODING = {"dtype": "f16", "endian": "le"}


@dataclass(frozen=True, kw_only=True)
class Callback:
    """One callback, ready to be sent."""

    id: str
    kind: str
    url: str
    attempts: int
    body: str


class Outbox:
    """Reads and writes the table of callbacks."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def announce(
        self, connection: sa.Connection, round_id: int, url: str, nonces: Sequence[int], *, interval: float, most: int
    ) -> None:
        """Owe ``/generated`` callbacks for valid nonces of a round: extend the open one, or open others.

        No callback announces more than twice ``most`` nonces.
        """
        for start in range(0, len(nonces), most):
            self._announce(connection, round_id, url, nonces[start : start + most], interval=interval, most=most)

    def _announce(
        self, connection: sa.Connection, round_id: int, url: str, nonces: Sequence[int], *, interval: float, most: int
    ) -> None:
        outbox, now = self._db["outbox"], time.time()
        open_row = (outbox.c.round_id == round_id) & (outbox.c.kind == "generated") & (outbox.c.status == "open")
        row = connection.execute(sa.select(outbox).where(open_row)).mappings().first()
        if row is None or row["url"] != url:
            connection.execute(outbox.update().where(open_row).values(status="pending"))
            row = self._add(
                connection, round_id, "generated", url, status="open", first_nonce=nonces[0], nonces=0, created_at=now
            )
        count = row["nonces"] + len(nonces)
        due = count >= most or abs(now - row["created_at"]) >= interval
        connection.execute(
            outbox.update()
            .where(outbox.c.id == row["id"])
            .values(last_nonce=nonces[-1], nonces=count, status="pending" if due else "open")
        )

    def add(self, connection: sa.Connection, round_id: int | None, kind: str, url: str, body: dict[str, Any]) -> None:
        """Owe a callback with a body of its own."""
        self._add(connection, round_id, kind, url, status="pending", body=dumps(body), created_at=time.time())

    def _add(self, connection: sa.Connection, round_id: int | None, kind: str, url: str, **values: Any) -> Any:
        row = {"id": f"msg_{uuid.uuid4().hex}", "round_id": round_id, "kind": kind, "url": url, "next_attempt_at": 0.0}
        row |= values
        connection.execute(self._db["outbox"].insert().values(row))
        return row

    def close_open(self, interval: float) -> None:
        """Release callbacks that have collected nonces for ``interval`` seconds."""
        outbox, now = self._db["outbox"], time.time()
        ripe = (outbox.c.status == "open") & (sa.func.abs(now - outbox.c.created_at) >= interval)
        with self._db.read() as connection:
            found = connection.execute(sa.select(sa.func.count()).where(ripe)).scalar_one()
        if found:
            with self._db.write() as connection:
                connection.execute(outbox.update().where(ripe).values(status="pending"))

    def retry_now(self) -> None:
        """Forget the pauses of pending callbacks: the clock may have been set back since they were written."""
        outbox = self._db["outbox"]
        with self._db.write() as connection:
            connection.execute(outbox.update().where(outbox.c.status == "pending").values(next_attempt_at=0.0))

    def due(self, limit: int, *, besides: Iterable[str] = ()) -> list[Callback]:
        """Return up to ``limit`` callbacks whose time has come, the oldest first."""
        outbox = self._db["outbox"]
        ready = (outbox.c.status == "pending") & (outbox.c.next_attempt_at <= time.time())
        query = sa.select(outbox).where(ready, outbox.c.id.not_in(list(besides)))
        query = query.order_by(outbox.c.next_attempt_at, outbox.c.seq).limit(limit)
        with self._db.read() as connection:
            rows = connection.execute(query).mappings().all()
            return [
                Callback(
                    id=row["id"],
                    kind=row["kind"],
                    url=row["url"],
                    attempts=row["attempts"],
                    body=row["body"] or dumps(self._generated(connection, row)),
                )
                for row in rows
            ]

    def _generated(self, connection: sa.Connection, row: Any) -> dict[str, Any]:
        records, rounds = self._db["records"], self._db["rounds"]
        round = connection.execute(sa.select(rounds).where(rounds.c.id == row["round_id"])).mappings().one()
        run = records.c.nonce.between(row["first_nonce"], row["last_nonce"])
        query = sa.select(records).where(records.c.round_id == row["round_id"], run, records.c.valid == 1)
        found = connection.execute(query.order_by(records.c.nonce)).all()
        body = {name: round[name] for name in ("public_key", "block_hash", "block_height", "node_id")}
        if found and found[0].vector is not None:
            artifacts = [{"nonce": r.nonce, "vector_b64": base64.b64encode(r.vector).decode()} for r in found]
            return body | {"artifacts": artifacts, "encoding": _ENCODING | {"k_dim": len(found[0].vector) // 2}}
        nonces, distances = [r.nonce for r in found], [r.distance for r in found]
        return body | {"nonces": nonces, "dist": distances, "r_target": round["r_target"]}

    def delivered(self, callback_id: str) -> None:
        """Record that a callback was accepted."""
        self._finish(callback_id, status="delivered", finished_at=time.time(), last_error=None)

    def failed(self, callback_id: str, error: str, *, retry_in: float | None) -> None:
        """Record a failure: another attempt after ``retry_in`` seconds, or a dead letter if that is None."""
        if retry_in is None:
            self._finish(callback_id, status="dead", finished_at=time.time(), last_error=error)
        else:
            self._finish(callback_id, next_attempt_at=time.time() + retry_in, last_error=error)

    def _finish(self, callback_id: str, **values: Any) -> None:
        outbox = self._db["outbox"]
        with self._db.write() as connection:
            query = outbox.update().where(outbox.c.id == callback_id)
            connection.execute(query.values(attempts=outbox.c.attempts + 1, **values))

    def counts(self) -> dict[str, int]:
        """Return how many callbacks are pending (open ones included) and dead."""
        outbox = self._db["outbox"]
        count = sa.select(sa.func.count()).select_from(outbox)
        with self._db.read() as connection:
            owed = connection.execute(count.where(outbox.c.status.in_(OWED))).scalar_one()
            dead = connection.execute(count.where(outbox.c.status == "dead")).scalar_one()
        return {"pending": owed, "dead": dead}

    def owed(self, connection: sa.Connection, round_id: int | None) -> int:
        """Return how many callbacks of a round are undelivered; None asks for those of artifact jobs."""
        outbox = self._db["outbox"]
        query = sa.select(sa.func.count()).where(outbox.c.status.in_(OWED), outbox.c.round_id == round_id)
        return int(connection.execute(query).scalar_one())

    def rows(self, statuses: Sequence[str], limit: int) -> list[dict[str, Any]]:
        """Return the newest callbacks of some statuses, without their bodies."""
        outbox = self._db["outbox"]
        columns = [column for column in outbox.c if column.name not in ("body", "seq")]
        query = sa.select(*columns).where(outbox.c.status.in_(statuses)).order_by(outbox.c.seq.desc()).limit(limit)
        with self._db.read() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def replay(self, ids: Sequence[str] | None = None) -> int:
        """Make dead letters pending again, all or some; return how many."""
        outbox = self._db["outbox"]
        dead = outbox.c.status == "dead"
        if ids is not None:
            dead &= outbox.c.id.in_(list(ids))
        with self._db.write() as connection:
            query = outbox.update().where(dead)
            fresh = {"status": "pending", "attempts": 0, "next_attempt_at": 0.0, "finished_at": None}
            return int(connection.execute(query.values(fresh)).rowcount)

    def prune(self, keep: float) -> None:
        """Delete callbacks that were delivered more than ``keep`` seconds ago."""
        outbox = self._db["outbox"]
        old = (outbox.c.status == "delivered") & (outbox.c.finished_at < time.time() - keep)
        with self._db.write() as connection:
            connection.execute(outbox.delete().where(old))


@contextmanager
def open_outbox(data_dir: Path) -> Iterator[Outbox]:
    """Open the outbox of a service, which may be running.

    Raises:
        UsageError: There is no database of a service.
        StorageError: The database cannot be read.
    """
    if not (data_dir / "service.sqlite3").is_file():
        raise UsageError(
            f"no database in {data_dir}", wanted="the data directory of a service", do="pass its --data-dir"
        )
    database = Database(data_dir, exclusive=False)
    try:
        yield Outbox(database)
    finally:
        database.close()
