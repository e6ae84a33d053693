"""The two ways in: signed messages that nodes send, and nonces that are asked for at the services of nodes.

A message is taken before routing, checked against the pins, and answered once it is on disk. Routing, parameters and a
response object of the framework would cost more processor time than the check of a message.
"""

import asyncio
import hashlib
import time
from typing import Any

import httpx
import structlog
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from assay.errors import AssayError, DataError
from assay.files.jsonl import JsonObject, dumps, loads
from assay.poc.net.guard import Blocked, call, new_client
from assay.poc.net.logs import LogBudget
from assay.poc.net.refusals import Refusal, refusal_of
from assay.poc.net.routes import Bodies, answer, send_json
from assay.poc.net.signatures import message_id
from assay.poc.protocol.round import MAX_NONCE
from assay.poc.validator.claims import Claim, Reader, parsed, read_claim, refused, sender_of
from assay.poc.validator.controller import ValidatorController
from assay.poc.validator.inbox import Message
from assay.poc.validator.registry import Sender

log = structlog.get_logger("assay.validator.intake")

PREFIX = "/api/v1/validator"
PROOFS_AT_ONCE = 2  # proofs that are parsed at the same time; each takes many times its size in memory
LONGEST_HEADER = 2**16  # bytes of the first line of a proof

_BODIES = {True: b'{"status":"OK","new":true}', False: b'{"status":"OK","new":false}'}


class Intake:
    """Takes ``POST /generated``, ``/validated`` and ``/proofs``, and passes everything else on."""

    def __init__(self, app: ASGIApp, *, controller: ValidatorController) -> None:
        self._app, self._controller = app, controller
        settings, server = controller.settings, controller.server
        callbacks = Bodies(server.max_body, server.max_bodies)
        proofs = Bodies(settings.max_proof, max(server.max_bodies, PROOFS_AT_ONCE * settings.max_proof))
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
            await send_json(send, _BODIES[new])
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
        caller = scope["client"][0] if scope.get("client") else None
        self._budget.info(log, "refused", route=path, status=refusal.status, value=name, caller=caller)
        await answer(refusal)(scope, receive, send)

    def callback(self, kind: str, body: bytes, headers: dict[str, str]) -> Message:
        """Return a callback as it is kept, after key, signature and every value in it were checked."""
        text, values = parsed(body)
        sender = sender_of(values, self._controller.registry)
        sender.signatures.check(text, headers)
        known_as = message_id(headers)
        # The path is not signed. The body is, and tells the two kinds apart.
        if ("fraud_detected" in values) != (kind == "validated"):
            raise refused("body", "that of another callback", f"one of /{kind}")
        if kind == "validated":  # no evidence
            return Message(sender.public_key, known_as, kind, 0, body)
        reader = self._controller.reader
        return claimed_message(kind, known_as, body, reader.claim(values, sender), reader)

    async def _proof(self, body: bytes, headers: dict[str, str]) -> Message:
        """Return a proof as it is kept. The signature is checked before more than its first line is read."""
        try:
            header = loads(body[: min(max(0, body.find(b"\n")), LONGEST_HEADER)], "line 1")
            values = header.get("round")
            sender = sender_of(values if isinstance(values, dict) else {}, self._controller.registry)
            text = body.decode()
        except (DataError, UnicodeDecodeError):
            raise refused("format", "another body", "that of a proof file", status=400) from None
        sender.signatures.check(text, headers)
        known_as = message_id(headers)
        del text
        async with self._parsing:
            reader = self._controller.reader
            claim = await asyncio.to_thread(read_claim, "proof", body, reader)
            return claimed_message("proof", known_as, body, claim, reader)


def claimed_message(
    kind: str, known_as: str, body: bytes, claim: Claim, reader: Reader, pulled: tuple[str, int, int] | None = None
) -> Message:
    """Return a message as it is kept, with what it claims."""
    key, count = claim.round.public_key, len(claim.nonces)
    return Message(key, known_as, kind, count, body, claim.encode(), reader.pins, pulled)


def _name(refusal: Refusal) -> str:
    """Return the name under which a refusal is counted."""
    names = refusal.fields.get("fields")
    if names:
        return str(names[0])
    return {401: "signature", 400: "webhook-id", 413: "body", 408: "body", 503: "busy"}.get(refusal.status, "other")


LONGEST_ANSWER = 2**20
LIMIT = 1000  # nonces of one answer
_SHARE = ("public_key", "block_hash", "block_height", "node_id")


class Poller:
    """Asks every node that has an address, again and again, under the guard of callbacks.

    ``GET /api/v1/pow/status?after=N`` of a node has its valid nonces above N with their distances, its share, length
    and target. What is pulled goes the way of a callback with the same body, and is kept once. Vectors are not offered
    there.
    """

    def __init__(self, controller: ValidatorController) -> None:
        self._controller, self._server = controller, controller.server
        self._room = asyncio.Semaphore(controller.server.callback_concurrency)

    async def run(self) -> None:
        """Poll until cancelled."""
        async with new_client(self._server.callback_timeout, self._server.callback_concurrency) as client:
            while True:
                polled = self._controller.registry.polled
                await asyncio.gather(*(self._poll(client, sender) for sender in polled))
                await asyncio.sleep(self._controller.settings.poll_interval)

    async def _poll(self, client: httpx.AsyncClient, sender: Sender) -> None:
        outcome = "failed"
        async with self._room:
            try:
                async with asyncio.timeout(self._server.callback_timeout):
                    outcome = await self.poll(client, sender)
            except Refusal as error:
                outcome = "refused"
                log.warning("poll", reason=error.seen)
            except (Blocked, TimeoutError, httpx.HTTPError, httpx.InvalidURL, OSError, AssayError) as error:
                log.warning("poll", reason=f"{type(error).__name__}: {error}"[:200])
        self._controller.metrics.polls.labels(outcome).inc()

    async def poll(self, client: httpx.AsyncClient, sender: Sender) -> str:
        """Take what a node has found since the last time; return ``taken`` or ``empty``."""
        state = _state(await self._ask(client, sender, {}))
        if state is None or state["public_key"] != sender.public_key:
            return "empty"  # another key's round: nothing of this node
        block, node_id = state["block_hash"], state["node_id"]
        inbox = self._controller.inbox
        known = node_id if type(node_id) is int and 0 <= node_id <= MAX_NONCE else -1
        after = await asyncio.to_thread(inbox.pulled, sender.public_key, str(block), known)
        values = await self._ask(client, sender, {"after": after, "limit": LIMIT})
        found = _state(values)
        if found is None or (found["block_hash"], found["node_id"]) != (block, node_id):
            return "empty"  # another round began between the two questions
        reader = self._controller.reader
        seq_len = reader.registry.network.round.seq_len
        for name, wanted in (("node_count", sender.node_count), ("seq_len", seq_len)):
            if found.get(name) != wanted:
                raise refused(name, found.get(name), wanted)
        body = {name: found[name] for name in _SHARE}
        body |= {"nonces": values.get("valid_nonces"), "dist": values.get("valid_distances")}
        body["r_target"] = values.get("r_target")
        if not body["nonces"]:
            return "empty"
        claim = reader.claim(body, sender)
        text = dumps(body).encode()
        name = f"pull_{hashlib.sha256(text).hexdigest()}"
        pulled = (claim.round.block_hash, claim.round.node_id, claim.nonces[-1])
        await self._controller.writer.keep(claimed_message("pulled", name, text, claim, reader, pulled))
        return "taken"

    async def _ask(self, client: httpx.AsyncClient, sender: Sender, query: dict[str, int]) -> JsonObject:
        """Return the answer of ``/status``, bounded, from an address that was checked."""
        assert sender.url is not None
        response = await call(
            client,
            "GET",
            sender.url,
            "/api/v1/pow/status",
            allow_private=self._server.allow_private_callbacks,
            headers={"Authorization": f"Bearer {sender.read_key}"} if sender.read_key is not None else {},
            params=query,
        )
        try:
            if not response.is_success:
                raise httpx.HTTPError(f"HTTP {response.status_code}")
            content = bytearray()
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > LONGEST_ANSWER:
                    raise httpx.HTTPError(f"an answer of more than {LONGEST_ANSWER} bytes")
        finally:
            await response.aclose()
        return parsed(bytes(content))[1]


def _state(values: JsonObject) -> dict[str, Any] | None:
    """Return the round of an answer; None where there is no round, or it is not of the published form."""
    config = values.get("config")
    return config if isinstance(config, dict) and all(name in config for name in _SHARE) else None
