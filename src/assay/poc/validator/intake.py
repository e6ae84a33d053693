"""The way in of callbacks and proofs, ahead of the router."""

import asyncio
from collections import defaultdict
from functools import partial

from fastapi import Request, Response
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from assay.errors import AssayError, DataError
from assay.files.jsonl import JsonObject, loads
from assay.poc.net.bodies import Bodies
from assay.poc.net.logs import LogBudget
from assay.poc.net.refusals import Refusal, refusal_of
from assay.poc.net.routes import observed
from assay.poc.net.shares import PARTS
from assay.poc.net.signatures import message_id, parsed
from assay.poc.validator.claims import Claim, Reader, read_proof, refused, sender_of
from assay.poc.validator.inbox import Message
from assay.poc.validator.validator_controller import ValidatorController

PREFIX = "/api/v1/validator"
# Proofs that are parsed at the same time; each takes many times its size in memory.
PROOFS_AT_ONCE = 2
LONGEST_HEADER = 2**16  # bytes of the first line of a proof
_BODIES = {True: b'{"status":"OK","new":true}', False: b'{"status":"OK","new":false}'}


class Intake:
    """Takes ``POST /generated``, ``/validated`` and ``/proofs``, and passes everything else on."""

    def __init__(self, app: ASGIApp, *, controller: ValidatorController) -> None:
        self._app = app
        self._controller = controller
        settings = controller.settings
        server = controller.server
        callbacks = Bodies(server.max_body, server.max_bodies)
        proofs = Bodies(settings.max_proof, max(server.max_bodies, PARTS * settings.max_proof))
        self._bodies = {"generated": callbacks, "validated": callbacks, "proof": proofs}
        self._kinds = {
            f"{PREFIX}/generated": "generated",
            f"{PREFIX}/validated": "validated",
            f"{PREFIX}/proofs": "proof",
        }
        self._parsing = asyncio.Semaphore(PROOFS_AT_ONCE)
        # One proof of each node waits for a free place, in turn.
        self._turns = defaultdict[str, asyncio.Lock](asyncio.Lock)
        self._budget = LogBudget()
        # Prometheus sees no increase in a series that appears.
        for path in self._kinds:
            controller.metrics.requests.labels(path, "200")
            controller.metrics.request_seconds.labels(path)

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Take a message, or pass the request on."""
        kind = (
            self._kinds.get(scope["path"])
            if scope["type"] == "http" and scope["method"] == "POST"
            else None
        )
        if kind is None:
            await self._app(scope, receive, send)
            return
        response = await observed(
            partial(self._take, kind),
            Request(scope, receive),
            path=scope["path"],
            metrics=self._controller.metrics,
            budget=self._budget,
        )
        await response(scope, receive, send)

    async def _take(self, kind: str, request: Request) -> Response:
        headers = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in request.scope["headers"]
        }
        try:
            async with self._bodies[kind].read(request) as body:
                message = await self._message(kind, body, headers)
                return Response(
                    _BODIES[await self._controller.writer.keep(message)],
                    media_type="application/json",
                )
        except AssayError as error:
            self._controller.metrics.refused.labels(_name(refusal_of(error))).inc()
            raise

    async def _message(self, kind: str, body: bytes, headers: dict[str, str]) -> Message:
        """Return a message as it is kept, after key, signature and every value in it were checked.

        The signature of a proof is checked before more than its first line is read.
        """
        reader = self._controller.reader
        registry = reader.registry
        if kind == "proof":
            try:
                header = loads(body[: min(max(0, body.find(b"\n")), LONGEST_HEADER)], "line 1")
                stated = header.get("round")
                values: JsonObject = stated if isinstance(stated, dict) else {}
                sender = sender_of(values, registry)
                text = body.decode()
            except (DataError, UnicodeDecodeError):
                raise refused(
                    "format", "another body", "that of a proof file", status=400
                ) from None
        else:
            text, values = parsed(body)
            sender = sender_of(values, registry)
        sender.signatures.check(text, headers)
        known_as = message_id(headers)
        if kind == "proof":
            del text
            async with self._turns[sender.public_key], self._parsing:
                claim = await asyncio.to_thread(read_proof, body, reader)
                return claimed_message(kind, known_as, body, claim, reader)
        # The path is not signed. The body is, and tells the two kinds apart.
        if ("fraud_detected" in values) != (kind == "validated"):
            raise refused("body", "that of another callback", f"one of /{kind}")
        if kind == "validated":  # no evidence
            return Message(sender.public_key, known_as, kind, 0, body)
        return claimed_message(kind, known_as, body, reader.claim(values, sender), reader)


def claimed_message(
    kind: str,
    name: str,
    body: bytes,
    claim: Claim,
    reader: Reader,
    pulled: tuple[str, int, int] | None = None,
) -> Message:
    """Return a message as it is kept, with what it claims."""
    key = claim.round.public_key
    return Message(
        key, name, kind, len(claim.nonces), body, claim.encode(), reader.pins(key), pulled
    )


def _name(refusal: Refusal) -> str:
    """Return the name under which a refusal is counted."""
    statuses = {401: "signature", 400: "webhook-id", 413: "body", 408: "body", 503: "busy"}
    return str((refusal.fields.get("fields") or [statuses.get(refusal.status, "other")])[0])
