"""A receiver of callbacks: checks signatures, stores each callback once, and lists them.

The routes are those of the published receiver script; the callbacks are in one SQLite file. Only
posts that a known secret has signed need no key.
"""

import time
from pathlib import Path
from typing import Annotated, Literal

import sqlalchemy as sa
import structlog
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from assay.errors import UsageError
from assay.files.jsonl import JsonObject, loads
from assay.files.sqlite_connections import damaged
from assay.files.sqlite_schema import table_names
from assay.poc.net.application import new_app
from assay.poc.net.keys import Keys, Scope
from assay.poc.net.local_only import LocalOnly
from assay.poc.net.logs import LogBudget
from assay.poc.net.routes import route_class
from assay.poc.net.server import listen, run_app
from assay.poc.net.server_settings import ListenerSettings, is_loopback
from assay.poc.net.signatures import Signatures, message_id, parsed, unsigned
from assay.poc.protocol.checks import MAX_NONCE
from assay.poc.service.database import RECEIVED, open_database

log = structlog.get_logger("assay.receiver")

# Bytes of a callback that are taken whatever the settings say.
LEAST_BODY = 2**21
MOST_LISTED = 2**25  # bytes of the bodies of one answer
_TOLD_BY = {"fraud_detected": "validated", "receipts": "receipts"}


class Received:
    """The callbacks that arrived, each once, in an SQLite file that only its owner may read.

    Raises:
        StorageError: The file cannot be written, or is not one of a receiver.
    """

    def __init__(self, path: Path) -> None:
        tables = table_names(path, flag="--output") if path.is_file() else set()
        if tables and "received" not in tables:
            raise damaged(
                path,
                f"a database of something else, with a table {min(tables)!r:.60}",
                flag="--output",
            )
        self._db = open_database(
            path.parent, exclusive=False, name=path.name, migrations=RECEIVED, flag="--output"
        )
        self._received = self._db["received"]

    def add(self, message_id: str, kind: str, body: str, values: JsonObject) -> bool:
        """Keep a callback, whose body has these ``values``; return False if its id was known.

        It is on disk when this returns.
        """
        received = self._received
        lists = [
            values[name] for name in ("nonces", "artifacts") if isinstance(values.get(name), list)
        ]
        row = {
            "id": message_id,
            "kind": kind,
            "at": time.time(),
            "nonces": max(map(len, lists), default=0),
        }
        with self._db.write() as connection:
            again = (
                received.update()
                .where(received.c.id == message_id)
                .values(copies=received.c.copies + 1)
            )
            if connection.execute(again).rowcount:
                return False
            connection.execute(received.insert().values(**row, copies=1, body=body))
            return True

    def batches(self, after: int, limit: int) -> list[JsonObject]:
        """Return callbacks after a sequence number, oldest first, at most ``limit``."""
        received = self._received
        callbacks = list[JsonObject]()
        size = 0
        query = (
            sa.select(received).where(received.c.seq > after).order_by(received.c.seq).limit(limit)
        )
        with self._db.read() as connection:
            for row in connection.execute(query, execution_options={"yield_per": 16}):
                size += len(row.body)
                if callbacks and size > MOST_LISTED:
                    break
                callbacks.append({**row._mapping, "body": loads(row.body, "callback")})
        return callbacks

    def stats(self) -> dict[str, int]:
        """Return how many callbacks and nonces there are, and how many copies came more than
        once.
        """
        received = self._received
        total = sa.select(
            sa.func.count().label("callbacks"),
            sa.func.coalesce(sa.func.sum(received.c.nonces), 0).label("nonces"),
            sa.func.coalesce(sa.func.sum(received.c.copies - 1), 0).label("repeated"),
        )
        return self._db.rows(total)[0]._asdict()

    def clear(self) -> None:
        """Forget everything."""
        self._db.change(self._received.delete())


def receive(settings: ListenerSettings, output: Path, *, host: str, port: int) -> None:
    """Receive callbacks until SIGTERM or SIGINT, and keep them in the SQLite file ``output``.

    Raises:
        UsageError: A host that others reach without a secret, or an address that cannot be bound.
        StorageError: The file cannot be written.
    """
    if not (settings.callback_secrets or is_loopback(host)):
        raise UsageError(
            f"--host {host} without a secret",
            wanted="a secret where others reach the port",
            do="pass --callback-secret, the same as to the service",
        )
    settings = settings.model_copy(update={"max_body": max(LEAST_BODY, settings.max_body)})
    with listen(host, port) as listener:
        run_app(create_receiver(Received(output), settings), settings, listener)


def create_receiver(store: Received, settings: ListenerSettings) -> FastAPI:
    """Return the receiver as an application.

    Without a secret it answers this machine only. With one, callbacks that no secret signed are
    refused with 401, and everything else needs a key.

    Args:
        store: Store that keeps the callbacks.
        settings: Secrets, keys that may read and clear, keys that may only read, and bounds of
            bodies.
    """
    secrets = settings.callback_secrets
    signatures = Signatures(secrets)
    budget = LogBudget()
    app = new_app("assay: receiver of callbacks")
    app.router.route_class = route_class(Keys(settings, needed=bool(secrets)), settings)
    if not secrets:
        app.add_middleware(LocalOnly)

    @app.post("/{kind}")
    async def take(
        kind: Literal["generated", "validated", "receipts"], request: Request
    ) -> Response:
        """Accept a callback: nonces or vectors (generated), a verdict, or receipts."""
        body, values = parsed(await request.body())
        signatures.check(body, request.headers)
        # The path is not signed. The body is, and tells the kinds apart.
        kind_of_body = next(
            (kind_of_name for name, kind_of_name in _TOLD_BY.items() if name in values), "generated"
        )
        if values and kind != kind_of_body:
            raise unsigned(400, f"the body of another callback under /{kind}")
        known_as = message_id(request.headers)
        new = await run_in_threadpool(store.add, known_as, kind, body, values)
        budget.info(log, "callback", kind=kind, id=known_as, new=new)
        return JSONResponse({"status": "OK", "new": new})

    @app.get("/batches", openapi_extra=Scope.READ.extra)
    def batches(
        after: Annotated[int, Query(ge=0, le=MAX_NONCE)] = 0,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    ) -> Response:
        """Return what arrived, oldest first."""
        return JSONResponse({"batches": store.batches(after, limit)})

    @app.get("/stats", openapi_extra=Scope.READ.extra)
    def stats() -> Response:
        """Return counts."""
        return JSONResponse(store.stats())

    @app.delete("/clear", openapi_extra=Scope.CONTROL.extra)
    def clear() -> Response:
        """Forget everything."""
        store.clear()
        log.info("cleared")
        return JSONResponse({"status": "OK"})

    @app.get("/health")
    async def health() -> Response:
        """Answer while the process lives."""
        return JSONResponse({"status": "ok"})

    return app
