"""A receiver of callbacks: checks signatures, keeps every callback once, and can be asked what it has.

The routes are those of the published receiver script; what it keeps is in one SQLite file.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from standardwebhooks import Webhook, WebhookVerificationError
from starlette.concurrency import run_in_threadpool

from assay.poc.service._refusals import Refusal

__all__ = ["Received", "create_receiver"]

_TABLES = sa.MetaData()
_RECEIVED = sa.Table(
    "received",
    _TABLES,
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("nonces", sa.Integer, nullable=False),
    sa.Column("copies", sa.Integer, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
)


class Received:
    """The callbacks that arrived, each once.

    Args:
        path: SQLite file; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._engine = sa.create_engine(f"sqlite:///{path}")
        with self._engine.begin() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            _TABLES.create_all(connection)

    def add(self, message_id: str, kind: str, body: str) -> bool:
        """Keep a callback; False where its id was here before. It is on disk when this returns."""
        values = json.loads(body)
        count = len(values.get("nonces") or values.get("artifacts") or ())
        with self._engine.begin() as connection:
            known = connection.execute(
                _RECEIVED.update().where(_RECEIVED.c.id == message_id).values(copies=_RECEIVED.c.copies + 1)
            ).rowcount
            if not known:
                row = {"id": message_id, "kind": kind, "at": time.time(), "nonces": count, "copies": 1, "body": body}
                connection.execute(_RECEIVED.insert().values(row))
            return not known

    def batches(self, after: int, limit: int) -> list[dict[str, Any]]:
        """Return callbacks after a sequence number, oldest first."""
        query = sa.select(_RECEIVED).where(_RECEIVED.c.seq > after).order_by(_RECEIVED.c.seq).limit(limit)
        with self._engine.connect() as connection:
            rows = connection.execute(query).mappings().all()
        return [{**row, "body": json.loads(row["body"])} for row in rows]

    def stats(self) -> dict[str, int]:
        """Return how many callbacks and nonces there are, and how many copies came more than once."""
        total = sa.select(
            sa.func.count(),
            sa.func.coalesce(sa.func.sum(_RECEIVED.c.nonces), 0),
            sa.func.coalesce(sa.func.sum(_RECEIVED.c.copies - 1), 0),
        )
        with self._engine.connect() as connection:
            callbacks, nonces, copies = connection.execute(total).one()
        return {"callbacks": callbacks, "nonces": nonces, "repeated": copies}

    def clear(self) -> None:
        """Forget everything."""
        with self._engine.begin() as connection:
            connection.execute(_RECEIVED.delete())


def create_receiver(store: Received, secrets: Sequence[str] = (), *, max_body: int = 2**26) -> FastAPI:
    """Return the receiver as an application.

    Args:
        store: keeps what arrives.
        secrets: Standard Webhooks secrets; with any, a callback that none of them signed is refused with 401.
        max_body: bytes of the largest callback.
    """
    app = FastAPI(title="assay: receiver of callbacks", docs_url=None, redoc_url=None)
    verifiers = [Webhook(secret) for secret in secrets]

    async def receive(kind: str, request: Request) -> JSONResponse:
        raw = b""
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > max_body:
                return JSONResponse({"detail": f"a callback over {max_body} bytes"}, status_code=413)
        try:
            message_id, body = _verified(raw, dict(request.headers), verifiers)
        except Refusal as refusal:
            return JSONResponse(refusal.body, status_code=refusal.status)
        new = await run_in_threadpool(store.add, message_id, kind, body)
        return JSONResponse({"status": "OK", "new": new})

    @app.post("/generated")
    async def generated(request: Request) -> JSONResponse:
        """Take valid nonces of a round, or the vectors of a job."""
        return await receive("generated", request)

    @app.post("/validated")
    async def validated(request: Request) -> JSONResponse:
        """Take a verdict."""
        return await receive("validated", request)

    @app.get("/batches")
    def batches(after: int = 0, limit: int = 100) -> JSONResponse:
        """Return what arrived, oldest first."""
        return JSONResponse({"batches": store.batches(after, min(max(limit, 1), 10_000))})

    @app.get("/stats")
    def stats() -> JSONResponse:
        """Return counts."""
        return JSONResponse(store.stats())

    @app.delete("/clear")
    def clear() -> JSONResponse:
        """Forget everything."""
        store.clear()
        return JSONResponse({"status": "OK"})

    @app.get("/health")
    async def health() -> JSONResponse:
        """Answer."""
        return JSONResponse({"status": "ok"})

    return app


def _verified(raw: bytes, headers: dict[str, str], verifiers: Sequence[Webhook]) -> tuple[str, str]:
    """Return id and body of a callback whose signature and form are right."""
    try:
        body = raw.decode()
        if verifiers:
            _check_signature(body, headers, verifiers)
        if not isinstance(json.loads(body), dict):
            raise ValueError("not an object")
    except WebhookVerificationError as error:
        raise _refusal(401, f"signature: {error}") from None
    except ValueError as error:
        raise _refusal(400, f"body: {error}") from None
    message_id = headers.get("webhook-id", "")
    if not 0 < len(message_id) <= 128:
        raise _refusal(400, "no webhook-id")
    return message_id, body


def _check_signature(body: str, headers: dict[str, str], verifiers: Sequence[Webhook]) -> None:
    for verifier in verifiers[:-1]:
        try:
            verifier.verify(body, headers, json_parse=False)
            return
        except (WebhookVerificationError, ValueError):
            continue
    verifiers[-1].verify(body, headers, json_parse=False)


def _refusal(status: int, seen: str) -> Refusal:
    return Refusal(status, seen, wanted="a signed callback of assay", do="give both sides the same --callback-secret")
