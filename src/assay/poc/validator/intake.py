"""The way in: signed messages are taken before routing, checked against the pins, and answered once they are on disk.

Routing, parameters and a response object of the framework would cost more processor time than the check of a message:
``python benchmarks/validator_load.py`` says what a callback costs here.
"""

import asyncio
import time

import structlog
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from assay.errors import AssayError, DataError
from assay.files.jsonl import loads
from assay.poc.net.logs import LogBudget
from assay.poc.net.refusals import Refusal, refusal_of
from assay.poc.net.routes import SAFE_HEADERS, Bodies, answer
from assay.poc.net.signatures import message_id
from assay.poc.protocol.proof import Proof
from assay.poc.validator.claims import Reader, parsed, proof_claim, refused, sender_of
from assay.poc.validator.controller import Controller
from assay.poc.validator.inbox import Message
from assay.poc.validator.registry import Registry

log = structlog.get_logger("assay.validator.intake")

PREFIX = "/api/v1/validator"
PROOFS_AT_ONCE = 2  # proofs that are parsed at the same time; each takes many times its size in memory
LONGEST_HEADER = 2**16  # bytes of the first line of a proof

_SAFE = [(name.encode(), value.encode()) for name, value in SAFE_HEADERS.items()]
_BODIES = {True: b'{"status":"OK","new":true}', False: b'{"status":"OK","new":false}'}
_HEADERS = {
    new: [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json"), *_SAFE]
    for new, body in _BODIES.items()
}


class Intake:
    """Takes ``POST /generated``, ``/validated`` and ``/proofs``, and passes everything else on."""

    def __init__(self, app: ASGIApp, *, controller: Controller) -> None:
        self._app, self._controller = app, controller
        settings, service = controller.settings, controller.service
        callbacks = Bodies(service.max_body, service.max_bodies)
        proofs = Bodies(settings.max_proof, max(service.max_bodies, PROOFS_AT_ONCE * settings.max_proof))
        self._bodies = {"generated": callbacks, "validated": callbacks, "proof": proofs}
        paths = {"generated": "generated", "validated": "validated", "proofs": "proof"}
        self._kinds = {f"{PREFIX}/{path}": kind for path, kind in paths.items()}
        self._parsing = asyncio.Semaphore(PROOFS_AT_ONCE)
        self._budget = LogBudget()
        metrics = controller.metrics
        self._answered = {path: metrics.requests.labels(path, "200") for path in self._kinds}
        self._seconds = {path: metrics.request_seconds.labels(path) for path in self._kinds}

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Take a message, or pass the request on."""
        kind = self._kinds.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if kind is None:
            await self._app(scope, receive, send)
            return
        started, path = time.perf_counter(), scope["path"]
        try:
            new = await self._take(kind, Request(scope, receive))
        except ClientDisconnect:
            return
        except AssayError as error:
            await self._refuse(refusal_of(error), scope, receive, send)
        else:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS[new]})
            await send({"type": "http.response.body", "body": _BODIES[new]})
            self._answered[path].inc()
        self._seconds[path].observe(time.perf_counter() - started)

    async def _take(self, kind: str, request: Request) -> bool:
        async with self._bodies[kind].read(request) as body:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in request.scope["headers"]}
            if kind == "proof":
                message = await self._proof(body, headers)
            else:
                message = self.callback(kind, body, headers)
            return await self._controller.writer.keep(message)

    async def _refuse(self, refusal: Refusal, scope: Connection, receive: Receive, send: Send) -> None:
        path, name = scope["path"], _name(refusal)
        metrics = self._controller.metrics
        metrics.refused.labels(name).inc()
        metrics.requests.labels(path, str(refusal.status)).inc()
        if self._budget.take():
            caller = scope["client"][0] if scope.get("client") else None
            log.info(
                "refused", route=path, status=refusal.status, value=name, caller=caller, skipped=self._budget.skipped
            )
        await answer(refusal)(scope, receive, send)

    def callback(self, kind: str, body: bytes, headers: dict[str, str]) -> Message:
        """Return a callback as it is kept, after key, signature and every value in it were checked.

        Raises:
            Refusal: It is malformed, not signed, or contradicts the pins.
        """
        registry = self._controller.registry
        text, values = parsed(body)
        sender = sender_of(values, registry)
        sender.signatures.check(text, headers)
        known_as = message_id(headers)
        # The path is not signed. The body is, and tells the two kinds apart.
        if ("fraud_detected" in values) != (kind == "validated"):
            raise refused("body", "that of another callback", f"one of /{kind}")
        nonces = len(self._reader(registry).checked(values, sender)[0]) if kind == "generated" else 0
        return Message(sender.public_key, known_as, kind, nonces, body)

    async def _proof(self, body: bytes, headers: dict[str, str]) -> Message:
        """Return a proof as it is kept. The signature is checked before more than its first line is read."""
        registry = self._controller.registry
        try:
            header = loads(body[: min(max(0, body.find(b"\n")), LONGEST_HEADER)], "line 1")
            values = header.get("round")
            sender = sender_of(values if isinstance(values, dict) else {}, registry)
            text = body.decode()
        except (DataError, UnicodeDecodeError):
            raise refused("format", "another body", "that of a proof file", status=400) from None
        sender.signatures.check(text, headers)
        known_as = message_id(headers)
        del text
        async with self._parsing:
            nonces = await asyncio.to_thread(self._count_nonces, body, registry)
        return Message(sender.public_key, known_as, "proof", nonces, body)

    def _count_nonces(self, body: bytes, registry: Registry) -> int:
        """Return how many nonces a proof has, after all in it was held against the pins."""
        try:
            proof = Proof.parse("the proof", body)
        except AssayError as error:
            fields = {"fields": ["format"]}
            raise Refusal(422, error.seen, wanted=error.wanted, do=error.do, fields=fields) from None
        sender = registry.sender(proof.round.public_key)
        if sender is None:
            raise refused("public_key", proof.round.public_key, "of a node of the pins", status=403)
        return len(proof_claim(proof, sender, self._reader(registry)).nonces)

    def _reader(self, registry: Registry) -> Reader:
        return Reader(registry, self._controller.is_open, self._controller.settings.positions)


def _name(refusal: Refusal) -> str:
    """Return the name under which a refusal is counted."""
    names = refusal.fields.get("fields")
    if names:
        return str(names[0])
    return {401: "signature", 400: "webhook-id", 413: "body", 408: "body", 503: "busy"}.get(refusal.status, "other")
