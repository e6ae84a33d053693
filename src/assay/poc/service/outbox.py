"""Callbacks in a transactional outbox, delivered at least once.

A row of kind ``generated`` does not hold a body. It names a run of nonces of its round, and the
body is made from the records when it is sent; records never change, nor does the share that a row
is of, so a row always gives the same body under the same id. A row of kind ``receipts`` names a run
of sequence numbers in the same way; receipts that were deleted are missing from its body.
"""

import asyncio
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx
import sqlalchemy as sa
import structlog
from standardwebhooks import Webhook

from assay.errors import StorageError, UsageError, visible
from assay.files.jsonl import JsonObject, dumps, loads
from assay.files.sqlite import Database
from assay.poc.net.callback_urls import Blocked, call, new_client
from assay.poc.net.runtime import Runtime
from assay.poc.net.shares import room_of
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.protocol.records import artifact_fields, describe_packing
from assay.poc.service.database import FILE, open_database
from assay.poc.service.service_metrics import Metrics
from assay.poc.service.service_settings import ServiceSettings

log = structlog.get_logger("assay.callbacks")

OWED = ("open", "pending")
Kind = Literal["generated", "validated", "receipts"]
RECEIPTS: Kind = "receipts"
"""The kind of callbacks that announce receipts, and the last part of the path to which they are
posted.
"""
TICK = 0.5  # seconds between two looks into the outbox when no commit wakes the sender
LONGEST_PAUSE = 86_400.0  # seconds between two attempts
LONGEST_WORDS = 300  # bytes of an answer that are kept

Callback = sa.Row[Any]
"""A row of the table ``outbox``, without number and body."""


class Outbox:
    """Reads and writes the table of callbacks."""

    def __init__(self, database: Database) -> None:
        self.notify: Callable[[], object] = lambda: None
        """Is called, in the thread that wrote, whenever callbacks may be due."""
        self._db = database
        self._table = database["outbox"]
        self._c = self._table.c
        self._columns = [
            column for column in self._c if column.name not in ("seq", "body", "client")
        ]

    def announce(
        self,
        connection: sa.Connection,
        round_id: int | None,
        url: str,
        numbers: Sequence[int],
        *,
        interval: float,
        most: int,
        header: int | None = None,
    ) -> None:
        """Add valid nonces or stored receipts to callbacks of up to ``most`` that collect for
        seconds.
        """
        start = 0
        while start < len(numbers):
            row = self._collecting(connection, round_id, url, numbers[start], header)
            part = numbers[start : start + max(1, most - row.nonces)]
            start += len(part)
            count = row.nonces + len(part)
            due = count >= most or abs(time.time() - row.created_at) >= interval
            change = self._table.update().where(self._c.id == row.id)
            connection.execute(
                change.values(
                    last_nonce=part[-1], nonces=count, status="pending" if due else "open"
                )
            )

    def _collecting(
        self,
        connection: sa.Connection,
        round_id: int | None,
        url: str,
        first: int,
        header: int | None,
    ) -> sa.Row[Any]:
        """Return the open callback of a round or of receipts of one header, or a new one that
        begins with ``first``.
        """
        c = self._c
        receipts = self._db["receipts"].c
        kind = "generated" if header is None else RECEIPTS
        is_open = (
            c.round_id.is_not_distinct_from(round_id) & (c.kind == kind) & (c.status == "open")
        )
        row = connection.execute(sa.select(*self._columns).where(is_open)).first()
        if row is not None and row.url == url:
            last = sa.select(receipts.header_id).where(receipts.seq == row.last_nonce)
            if header is None or connection.execute(last).scalar() == header:
                return row
        connection.execute(self._table.update().where(is_open).values(status="pending"))
        return self._insert(connection, round_id, kind, url, status="open", first_nonce=first)

    def fix_share(self, connection: sa.Connection, round_id: int, node_id: int) -> None:
        """Write down whose nonces the callbacks of a round have, and let no others join them."""
        connection.exec_driver_sql(
            "UPDATE outbox SET node_id = ?, status = iif(status = 'open', 'pending', status) "
            "WHERE round_id = ? AND kind = 'generated' AND node_id IS NULL",
            (node_id, round_id),
        )

    def forget_receipts(self, connection: sa.Connection) -> None:
        """Owe no callback for receipts that were all deleted."""
        receipts = self._db["receipts"].c
        c = self._c
        has_receipts = sa.exists().where(receipts.seq.between(c.first_nonce, c.last_nonce))
        connection.execute(self._table.delete().where(c.kind == RECEIPTS, ~has_receipts))

    def add(
        self,
        connection: sa.Connection,
        round_id: int | None,
        kind: str,
        url: str,
        body: JsonObject,
        client: str | None,
    ) -> None:
        """Owe a callback with a body of its own, to a client where one asked for it."""
        self._insert(
            connection, round_id, kind, url, status="pending", body=dumps(body), client=client
        )

    def _insert(
        self, connection: sa.Connection, round_id: int | None, kind: str, url: str, **values: object
    ) -> sa.Row[Any]:
        new = self._table.insert().values(
            id=f"msg_{uuid.uuid4().hex}",
            round_id=round_id,
            kind=kind,
            url=url,
            created_at=time.time(),
            next_attempt_at=0.0,
            **values,
        )
        return connection.execute(new.returning(*self._columns)).one()

    def close_open(self, interval: float) -> None:
        """Release callbacks that have collected nonces for ``interval`` seconds."""
        age = sa.func.abs(time.time() - self._c.created_at)
        ripe = (self._c.status == "open") & (age >= interval)
        if self._db.scalar(sa.select(sa.exists().where(ripe))):
            self._db.change(self._table.update().where(ripe).values(status="pending"))

    def retry_now(self) -> None:
        """Forget the pauses of pending callbacks, because the clock may have been set back."""
        self._db.change(
            self._table.update().where(self._c.status == "pending").values(next_attempt_at=0.0)
        )

    def due(
        self, limit: int, *, besides: Iterable[str] = (), clients_besides: Iterable[str] = ()
    ) -> list[tuple[Callback, str]]:
        """Return up to ``limit`` due callbacks with bodies, the operator's first, then by age.

        Those of some ids, and those of some clients, are left out.
        """
        c = self._c
        callbacks = list[tuple[Callback, str]]()
        now = time.time()  # where the clock was set back, a pause may be longer than any
        is_due = (c.next_attempt_at <= now) | (c.next_attempt_at > now + LONGEST_PAUSE)
        is_free = c.client.is_(None) | c.client.not_in(list(clients_besides))
        ready = (c.status == "pending") & is_due & c.id.not_in(list(besides)) & is_free
        query: sa.Select[Any] = sa.select(*self._columns, c.client, c.body).where(ready)
        with self._db.read() as connection:
            # A client's wait for the operator's: its receiver may hang.
            query = query.order_by(c.client.is_not(None), c.next_attempt_at, c.seq)
            for row in connection.execute(query.limit(limit)).all():
                make = self._receipts if row.kind == RECEIPTS else self._generated
                callbacks.append((row, row.body or dumps(make(connection, row))))
        return callbacks

    def _receipts(self, connection: sa.Connection, callback: Callback) -> JsonObject:
        """Return what a receiver has to know of receipts in order to fetch them, and to see that
        they stay the same.
        """
        c, headers = self._db["receipts"].c, self._db["receipt_headers"].c
        query = sa.select(
            headers.text,
            c.seq,
            c.request_id,
            c.choice.label("index"),
            c.block_hash,
            c.tokens,
            c.sha256,
        )
        run = c.seq.between(callback.first_nonce, callback.last_nonce) & (headers.id == c.header_id)
        rows = [dict(row._mapping) for row in connection.execute(query.where(run).order_by(c.seq))]
        header = loads(rows[0]["text"], "header of receipts") if rows else {}
        receipts = [
            {name: value for name, value in row.items() if name != "text"}
            | {"sha256": row["sha256"].hex()}
            for row in rows
        ]
        return {
            "public_key": header.get("public_key"),
            "model": header.get("model"),
            "receipts": receipts,
        }

    def _generated(self, connection: sa.Connection, callback: Callback) -> JsonObject:
        records = self._db["records"]
        rounds = self._db["rounds"]
        round = connection.execute(sa.select(rounds).where(rounds.c.id == callback.round_id)).one()
        query = sa.select(records).where(
            records.c.round_id == callback.round_id,
            records.c.nonce.between(callback.first_nonce, callback.last_nonce),
            records.c.valid == 1,
        )
        records_of_run = connection.execute(query.order_by(records.c.nonce)).all()
        body = {name: getattr(round, name) for name in ("public_key", "block_hash", "block_height")}
        body["node_id"] = round.node_id if callback.node_id is None else callback.node_id
        if records_of_run and records_of_run[0].vector is not None:
            pipeline = get_pipeline(round.preset)
            artifacts = [
                {"nonce": row.nonce, **artifact_fields(row.vector, pipeline)}
                for row in records_of_run
            ]
            return body | {"artifacts": artifacts, "encoding": describe_packing(pipeline)}
        return body | {
            "nonces": [row.nonce for row in records_of_run],
            "dist": [row.distance for row in records_of_run],
            "r_target": round.r_target,
        }

    def attempted(self, callback_id: str, error: str | None, *, retry_in: float | None) -> None:
        """Record an attempt: a delivery where ``error`` is None, otherwise a failure.

        Another attempt follows a failure after ``retry_in`` seconds; if that is None, the callback
        is a dead letter.
        """
        now = time.time()
        values: dict[str, object] = {"attempts": self._c.attempts + 1, "last_error": error}
        if error is not None and retry_in is not None:
            values["next_attempt_at"] = now + retry_in
        else:
            values |= {"status": "delivered" if error is None else "dead", "finished_at": now}
        self._db.change(self._table.update().where(self._c.id == callback_id).values(values))

    def counts(self) -> dict[str, int]:
        """Return how many callbacks are pending or open, and dead ones of no client."""
        count = sa.select(sa.func.count()).select_from(self._table)
        status = self._c.status
        owed = count.where(status.in_(OWED))
        dead = count.where(status == "dead", self._c.client.is_(None))
        (row,) = self._db.rows(
            sa.select(owed.scalar_subquery().label("pending"), dead.scalar_subquery().label("dead"))
        )
        return row._asdict()

    def owed(self, round_id: int, kind: Kind) -> int:
        """Return how many callbacks of one kind of a round are undelivered."""
        return self._count_owed(self._c.round_id == round_id, self._c.kind == kind)

    def owed_of_jobs(self, *, client: str | None = None) -> int:
        """Return how many callbacks of jobs are undelivered, of all or of those of a client."""
        of_jobs = self._c.round_id.is_(None) & (self._c.kind != RECEIPTS)
        if client is not None:
            of_jobs &= self._c.client == client
        return self._count_owed(of_jobs)

    def _count_owed(self, *where: sa.ColumnElement[bool]) -> int:
        query = sa.select(sa.func.count()).where(self._c.status.in_(OWED), *where)
        return int(self._db.scalar(query))

    def rows(self, statuses: Sequence[str], limit: int) -> Sequence[Callback]:
        """Return callbacks of some statuses: dead ones first, then the newest."""
        query = sa.select(*self._columns).where(self._c.status.in_(statuses))
        order = ((self._c.status == "dead").desc(), self._c.seq.desc())
        return self._db.rows(query.order_by(*order).limit(limit))

    def replay(self, ids: Sequence[str] | None = None) -> int:
        """Make dead letters pending again, all or some; return how many."""
        dead = self._c.status == "dead"
        if ids is not None:
            dead &= self._c.id.in_(list(ids))
        return self._db.change(
            self._table.update()
            .where(dead)
            .values(
                {"status": "pending", "attempts": 0, "next_attempt_at": 0.0, "finished_at": None}
            )
        )

    def prune(self, keep: float) -> None:
        """Delete what was delivered, or is a client's and dead, for ``keep`` seconds."""
        is_over = (self._c.status == "delivered") | (
            (self._c.status == "dead") & self._c.client.is_not(None)
        )
        is_old = self._c.finished_at < self._db.settled_time() - keep
        self._db.change(self._table.delete().where(is_over, is_old))


@contextmanager
def open_outbox(data_dir: Path) -> Iterator[Outbox]:
    """Open the outbox of a service, which may be running."""
    if not (data_dir / FILE).is_file():
        raise UsageError(
            f"no database in {data_dir}",
            wanted="the data directory of a service",
            do="pass its --data-dir",
        )
    with closing(open_database(data_dir, exclusive=False)) as database:
        yield Outbox(database)


class Delivery:
    """Sends the callbacks that an outbox owes, until ``runtime`` ends."""

    def __init__(
        self, outbox: Outbox, runtime: Runtime, settings: ServiceSettings, metrics: Metrics
    ) -> None:
        self._outbox = outbox
        self._runtime = runtime
        self._settings = settings
        self._metrics = metrics
        self._signers = [Webhook(secret) for secret in settings.callback_secrets]
        # By id and client of the callback.
        self._sending: dict[tuple[str, str | None], asyncio.Task[None]] = {}
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Deliver until cancelled, then wait for the deliveries that run."""
        settings = self._settings
        async with new_client(settings.callback_timeout, settings.callback_concurrency) as client:
            loop = asyncio.get_running_loop()
            self._outbox.notify = partial(loop.call_soon_threadsafe, self._wake.set)
            try:
                while True:
                    self._wake.clear()
                    try:
                        await self._start_due(client)
                    except StorageError as error:
                        log.warning("outbox not readable", reason=error.seen)
                        await asyncio.sleep(1.0)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(TICK):  # wait_for may lose a cancellation
                            await self._wake.wait()
            finally:
                self._outbox.notify = lambda: None
                await asyncio.gather(*self._sending.values(), return_exceptions=True)

    async def _start_due(self, client: httpx.AsyncClient) -> None:
        outbox = self._outbox
        await self._runtime.call(outbox.close_open, self._settings.callback_interval)
        while len(self._sending) < self._settings.callback_concurrency:
            due = await self._runtime.call(
                outbox.due,
                1,
                besides=[callback_id for callback_id, _ in self._sending],
                clients_besides=self._clients_without_room(),
            )
            if not due:
                return
            callback, body = due[0]
            self._sending[callback.id, callback.client] = asyncio.create_task(
                self._deliver(client, callback, body)
            )

    def _clients_without_room(self) -> list[str]:
        """Return the clients that hold their share of the deliveries that run: the receiver of each
        may hang.
        """
        most = self._settings.callback_concurrency
        running = Counter(client for _, client in self._sending)
        return [
            client
            for client, own in running.items()
            if client is not None and room_of(client, most, running.total(), own) < 1
        ]

    async def _deliver(self, client: httpx.AsyncClient, callback: Callback, body: str) -> None:
        started = time.perf_counter()
        try:
            error, wait = await self._send(client, callback, body)
            self._metrics.delivery_seconds.observe(time.perf_counter() - started)
            await self._note(callback, error, wait)
        finally:
            self._sending.pop((callback.id, callback.client), None)
            self._wake.set()

    async def _send(
        self, client: httpx.AsyncClient, callback: Callback, body: str
    ) -> tuple[str | None, float]:
        """Send once; return the fault, and the pause that the receiver asks for: infinite if no
        attempt can succeed.
        """
        now = datetime.now(UTC)
        headers = {
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
            "webhook-id": callback.id,
            "webhook-timestamp": str(int(now.timestamp())),
        }
        if self._signers:
            headers["webhook-signature"] = " ".join(
                signer.sign(callback.id, now, body) for signer in self._signers
            )
        try:
            async with asyncio.timeout(self._settings.callback_timeout):
                response = await call(
                    client,
                    "POST",
                    callback.url,
                    f"/{callback.kind}",
                    allow_private=self._settings.allow_private_callbacks,
                    headers=headers,
                    content=body.encode(),
                    of_client=callback.client is not None,
                )
                words = "" if response.is_success else await _first_words(response)
                await response.aclose()
        except Blocked as error:
            return str(error), float("inf")
        except TimeoutError:
            return f"no answer in {self._settings.callback_timeout:g} s", 0.0
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return f"{type(error).__name__}: {error}"[:200], 0.0
        if response.is_success:
            return None, 0.0
        return f"HTTP {response.status_code}{words}", retry_after(
            response.headers.get("retry-after", "")
        )

    async def _note(self, callback: Callback, error: str | None, wait: float) -> None:
        """Write the outcome, however long the disk is full: otherwise the callback would be sent
        again at once.
        """
        settings = self._settings
        last = callback.attempts + 1 >= settings.callback_attempts or wait == float("inf")
        pause = max(
            backoff(callback.attempts, settings.callback_backoff, settings.callback_backoff_max),
            wait,
        )
        outcome = "delivered" if error is None else "dead" if last else "failed"
        self._metrics.deliveries.labels(outcome).inc()
        about = {
            "outcome": outcome,
            "kind": callback.kind,
            "id": callback.id,
            "attempt": callback.attempts + 1,
        }
        log.info("callback", **about) if error is None else log.warning(
            "callback", **about, error=error
        )
        retry_in = None if last else min(pause, LONGEST_PAUSE)
        while True:
            try:
                await self._runtime.call(
                    self._outbox.attempted, callback.id, error, retry_in=retry_in
                )
                return
            except StorageError:
                if self._runtime.closing.is_set():
                    return
                await asyncio.sleep(1.0)


async def _first_words(response: httpx.Response) -> str:
    """Return the first words of a refusal, with control characters written out, and what to do if
    no retry helps.
    """
    body = b""
    with suppress(httpx.HTTPError, TimeoutError):
        async with asyncio.timeout(1.0):
            body = await anext(response.aiter_raw(LONGEST_WORDS), b"")
    words = visible(" ".join(body.decode(errors="replace").split()))
    do = "correct that, or the callback URL, then run assay poc callbacks replay"
    is_final = response.is_client_error and response.status_code not in (408, 429)
    return (f": {words}" if words else "") + (f"; to do: {do}" if is_final else "")


def backoff(attempts: int, base: float, longest: float) -> float:
    """Return the pause before the next attempt: exponential up to a bound, with jitter."""
    return min(longest, base * 2.0 ** min(attempts, 60)) * random.uniform(0.5, 1.0)


def retry_after(value: str) -> float:
    """Return the seconds of a ``Retry-After`` header, at most a day; 0 for none or a date."""
    return min(float(value), LONGEST_PAUSE) if value.isascii() and value.isdigit() else 0.0
