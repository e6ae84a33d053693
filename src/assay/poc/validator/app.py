"""The application of a validator: the two ways in for messages, what operators and nodes may ask
it, and the page.

Nodes send signed messages, or are asked for their nonces. A message is taken before routing,
checked against the pins, and answered once it is on disk. Routing, parameters and a response object
of the framework would cost more processor time than the check of a message.
"""

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import chain, islice
from typing import Annotated, Any

import httpx
import structlog
from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from assay.errors import AssayError, DataError
from assay.files.jsonl import JsonObject, dumps, loads
from assay.poc.net.app import Feed, assemble_page, new_app, operations_router, page_router, run_with
from assay.poc.net.callbacks import Blocked, call, message_id, new_client, parsed
from assay.poc.net.deployment import Deployment
from assay.poc.net.logs import LogBudget
from assay.poc.net.refusals import Refusal, refusal_of
from assay.poc.net.routes import Bodies, Keys, LocalOnly, Scope, needs, observed, route_class
from assay.poc.net.server import LEAST_CHUNK, MAX_CHUNKS, listen, run_app
from assay.poc.net.settings import ServerSettings, check_host, is_loopback
from assay.poc.net.shares import PARTS
from assay.poc.protocol.round import MAX_NONCE
from assay.poc.validator.claims import Claim, Reader, read_claim, refused, sender_of
from assay.poc.validator.controller import ValidatorController
from assay.poc.validator.inbox import Message
from assay.poc.validator.registry import Sender
from assay.poc.validator.settings import ValidatorSettings
from assay.poc.validator.worker import account_id

log = structlog.get_logger("assay.validator")

PREFIX = "/api/v1/validator"
PROOFS_AT_ONCE = (
    2  # proofs that are parsed at the same time; each takes many times its size in memory
)
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
        paths = {"generated": "generated", "validated": "validated", "proofs": "proof"}
        self._kinds = {f"{PREFIX}/{path}": kind for path, kind in paths.items()}
        self._parsing = asyncio.Semaphore(PROOFS_AT_ONCE)
        self._turns = defaultdict[str, asyncio.Lock](
            asyncio.Lock
        )  # of each node one proof waits for that, in turn
        self._budget = LogBudget()
        for path in self._kinds:  # Prometheus sees no increase in a series that appears
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
        take = partial(self._take, kind)
        metrics = self._controller.metrics
        about: dict[str, Any] = {"path": scope["path"], "metrics": metrics, "budget": self._budget}
        response = await observed(take, Request(scope, receive), **about)
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
        registry = self._controller.registry
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
                reader = self._controller.reader
                claim = await asyncio.to_thread(read_claim, kind, body, reader)
                return claimed_message(kind, known_as, body, claim, reader)
        # The path is not signed. The body is, and tells the two kinds apart.
        if ("fraud_detected" in values) != (kind == "validated"):
            raise refused("body", "that of another callback", f"one of /{kind}")
        if kind == "validated":  # no evidence
            return Message(sender.public_key, known_as, kind, 0, body)
        reader = self._controller.reader
        return claimed_message(kind, known_as, body, reader.claim(values, sender), reader)


def claimed_message(
    kind: str,
    known_as: str,
    body: bytes,
    claim: Claim,
    reader: Reader,
    pulled: tuple[str, int, int] | None = None,
) -> Message:
    """Return a message as it is kept, with what it claims."""
    key = claim.round.public_key
    count = len(claim.nonces)
    return Message(key, known_as, kind, count, body, claim.encode(), reader.pins, pulled)


def _name(refusal: Refusal) -> str:
    """Return the name under which a refusal is counted."""
    names = refusal.fields.get("fields")
    if names:
        return str(names[0])
    return {401: "signature", 400: "webhook-id", 413: "body", 408: "body", 503: "busy"}.get(
        refusal.status, "other"
    )


LONGEST_ANSWER = 2**20
LIMIT = 1000  # nonces of one answer
_SHARE = ("public_key", "block_hash", "block_height", "node_id")


class Poller:
    """Asks every node that has an address, again and again, under the guard of callbacks.

    ``GET /api/v1/pow/status?after=N`` of a node has its valid nonces above N with their distances,
    its share, length and target. What is pulled goes the way of a callback with the same body, and
    is kept once. Vectors are not offered there.
    """

    def __init__(self, controller: ValidatorController) -> None:
        self._controller = controller
        self._server = controller.server
        self._room = asyncio.Semaphore(controller.server.callback_concurrency)

    async def run(self) -> None:
        """Poll until cancelled."""
        async with new_client(
            self._server.callback_timeout, self._server.callback_concurrency
        ) as client:
            while True:
                polled = [
                    candidate
                    for candidate in self._controller.registry.senders.values()
                    if candidate.entry.url is not None
                ]
                await asyncio.gather(*(self._poll(client, sender) for sender in polled))
                await asyncio.sleep(self._controller.settings.poll_interval)

    async def _poll(self, client: httpx.AsyncClient, sender: Sender) -> None:
        outcome = "failed"
        async with self._room:
            try:
                async with asyncio.timeout(self._server.callback_timeout):
                    outcome = await self._take(client, sender)
            except Refusal as error:
                outcome = "refused"
                log.warning("poll", reason=error.seen)
            except (
                Blocked,
                TimeoutError,
                httpx.HTTPError,
                httpx.InvalidURL,
                OSError,
                AssayError,
            ) as error:
                log.warning("poll", reason=f"{type(error).__name__}: {error}"[:200])
        self._controller.metrics.polls.labels(outcome).inc()

    async def _take(self, client: httpx.AsyncClient, sender: Sender) -> str:
        """Take what a node has found since the last time; return ``taken`` or ``empty``."""
        state = _state(await self._ask(client, sender, {}))
        if state is None or state["public_key"] != sender.public_key:
            return "empty"  # another key's round: nothing of this node
        block = state["block_hash"]
        node_id = state["node_id"]
        machine = node_id if type(node_id) is int and 0 <= node_id <= MAX_NONCE else -1
        after = await asyncio.to_thread(
            self._controller.inbox.pulled, sender.public_key, str(block), machine
        )
        values = await self._ask(client, sender, {"after": after, "limit": LIMIT})
        round_now = _state(values)
        if round_now is None or (round_now["block_hash"], round_now["node_id"]) != (block, node_id):
            return "empty"  # another round began between the two questions
        reader = self._controller.reader
        seq_len = reader.registry.network.round.seq_len
        for name, wanted in (("node_count", sender.node_count), ("seq_len", seq_len)):
            if round_now.get(name) != wanted:
                raise refused(name, round_now.get(name), wanted)
        if not values.get("valid_nonces"):
            return "empty"
        body = {name: round_now[name] for name in _SHARE} | {"nonces": values["valid_nonces"]}
        body |= {"dist": values.get("valid_distances"), "r_target": values.get("r_target")}
        claim = reader.claim(body, sender)
        text = dumps(body).encode()
        name = f"pull_{hashlib.sha256(text).hexdigest()}"
        pulled = (claim.round.block_hash, claim.round.node_id, claim.nonces[-1])
        message = claimed_message("pulled", name, text, claim, reader, pulled)
        if not sender.is_proven:  # anyone on the path could convict the node
            log.warning("polled over http, so it stays undecided", public_key=sender.public_key)
            message = Message(sender.public_key, name, "pulled", 0, text, pulled=pulled)
        await self._controller.writer.keep(message)
        return "taken"

    async def _ask(
        self, client: httpx.AsyncClient, sender: Sender, query: dict[str, int]
    ) -> JsonObject:
        """Return the answer of ``/status``, bounded, from an address that was checked."""
        url = sender.entry.url
        key = sender.entry.read_key
        assert url is not None
        response = await call(
            client,
            "GET",
            url,
            "/api/v1/pow/status",
            allow_private=self._server.allow_private_callbacks,
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            params=query,
        )
        try:
            if not response.is_success:
                raise httpx.HTTPError(f"HTTP {response.status_code}")
            content = bytearray()
            spare = MAX_CHUNKS
            async for chunk in response.aiter_raw():
                content += chunk
                spare += len(chunk) / LEAST_CHUNK - 1
                if len(content) > LONGEST_ANSWER or spare < 0:
                    raise httpx.HTTPError(
                        f"an answer of more than {LONGEST_ANSWER} bytes, or in tiny chunks"
                    )
        finally:
            await response.aclose()
        return parsed(bytes(content))[1]


def _state(values: JsonObject) -> dict[str, Any] | None:
    """Return the round of an answer; None where there is no round, or it is not of the published
    form.
    """
    config = values.get("config")
    return config if isinstance(config, dict) and all(name in config for name in _SHARE) else None


MOST_EPOCHS = 1000
READ = needs(Scope.READ)
CONTROL = needs(Scope.CONTROL)
After = Annotated[int, Query(ge=0, le=MAX_NONCE)]
Limit = Annotated[int, Query(ge=1, le=1000)]


class BlockBody(BaseModel):
    """A block of which messages are accepted from now on."""

    model_config = ConfigDict(extra="forbid", strict=True)

    block_hash: str
    block_height: Annotated[int, Field(ge=0, le=MAX_NONCE)]


def create_app(controller: ValidatorController) -> FastAPI:
    """Return a validator as an application, which starts and closes the controller."""
    server = controller.server
    feed = Feed(controller)
    app = new_app("assay: validator")
    kind_of_route = route_class(Keys(server), server, controller.metrics)
    app.include_router(_validator_router(controller, feed, kind_of_route))
    app.include_router(operations_router(controller, feed, kind_of_route))
    mark = "d='M3 8.5 7 12l6-8' stroke-width='1.8'"
    page = assemble_page("assay.poc.validator", brand="Validator", name="validator", mark=mark)
    app.include_router(page_router(*page))
    app.add_middleware(Intake, controller=controller)
    if not server.has_keys:
        app.add_middleware(LocalOnly)
    run_with(app, controller, feed, Poller(controller).run)
    return app


def _validator_router(
    controller: ValidatorController, feed: Feed, kind_of_route: type[APIRoute]
) -> APIRouter:
    """Return the routes under ``/api/v1/validator``. Those that read files are plain functions, run
    in threads.
    """
    router = APIRouter(prefix=PREFIX, route_class=kind_of_route)

    @router.get("/status", response_model=None, openapi_extra=READ)
    async def status() -> Response:
        """Return what the validator does, and what it accepts."""
        hidden = ("nodes", "changes")
        return JSONResponse(
            {name: value for name, value in feed.values.items() if name not in hidden}
        )

    @router.get("/events", response_model=None, openapi_extra=READ)
    async def events(request: Request) -> Response:
        """Stream a snapshot per second as server-sent events."""
        return await feed.respond(request)

    @router.get("/nodes", response_model=None, openapi_extra=READ)
    def nodes(after: After = 0, limit: Limit = 100) -> Response:
        """Return nodes, those with the strongest evidence of anything wrong first; ``after`` skips
        so many.
        """
        listed = controller.nodes()
        return JSONResponse({"total": len(listed), "nodes": listed[after : after + limit]})

    @router.get("/verdicts", response_model=None, openapi_extra=READ)
    def verdicts(after: After = 0, limit: Limit = 100) -> Response:
        """Return changes of verdicts with an id above ``after``, the oldest first."""
        return JSONResponse({"verdicts": controller.inbox.verdicts(limit, after=after)})

    @router.get("/evidence/{account}", response_model=None, openapi_extra=READ)
    def evidence(account: str, after: After = 0, limit: Limit = 100) -> Response:
        """Return entries of an account in the ledger, with a place above ``after`` among them, the
        oldest first.
        """
        present = (standing.account for standing in controller.worker.standings.values())
        known_accounts = chain(
            present, controller.ledger.accounts()
        )  # also those of builds that the pins no longer name
        matching = next(
            (candidate for candidate in known_accounts if account_id(candidate) == account), None
        )
        if matching is None:
            raise Refusal(
                404,
                "no such account",
                wanted="an account of /nodes",
                do="ask /api/v1/validator/nodes",
            )
        entries = islice(controller.ledger.entries(matching), after, after + limit)
        count, head = controller.ledger.head
        shown = [entry.model_dump() | {"hash": entry.hash} for entry in entries]
        return JSONResponse(
            {
                "account": vars(matching),
                "ledger": {"entries": count, "head": head},
                "entries": shown,
            }
        )

    @router.get("/commitments", response_model=None)
    def commitments(limit: Annotated[int, Query(ge=1, le=MOST_EPOCHS)] = 100) -> Response:
        """Return commitments, the newest first, with the secrets of epochs that have ended, and the
        ledger's head.

        It needs no key. Whoever records it holds the validator to both.
        """
        count, head = controller.ledger.head
        ledger = {"entries": count, "head": head}
        return JSONResponse({"commitments": controller.inbox.epochs(limit), "ledger": ledger})

    @router.get("/blocks", response_model=None, openapi_extra=READ)
    def blocks() -> Response:
        """Return the open blocks, the newest first."""
        return JSONResponse({"blocks": controller.blocks()})

    @router.post("/blocks", response_model=None, openapi_extra=CONTROL)
    def announce(body: BlockBody) -> Response:
        """Open a block: messages of it are accepted from now on."""
        new = controller.announce(body.block_hash, body.block_height)
        log.info("block", block_hash=body.block_hash, block_height=body.block_height, new=new)
        return JSONResponse({"status": "OK", "new": new})

    return router


def validate(
    load: Callable[[], Deployment],
    settings: ValidatorSettings,
    server: ServerSettings,
    *,
    reference: str,
    host: str,
    port: int,
) -> None:
    """Run a validator until SIGTERM or SIGINT.

    Args:
        load: Function that loads the model and returns its deployment.
        settings: Settings of the validator.
        server: Settings of the server: keys, secrets, data directory, bounds.
        reference: Name of the model.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one, which the log names.

    Raises:
        UsageError: A host that others reach without keys or without secrets, or an address that
            cannot be bound.
        StorageError: The data directory is in use or cannot be written.
        DataError: The pins or the nodes file is wrong.
        ModelError: The model cannot be loaded.
    """
    check_host(host, server)
    with listen(host, port) as listener:
        controller = ValidatorController(
            load, settings, server, reference=reference, signed=not is_loopback(host)
        )
        run_app(create_app(controller), server, listener, runtime=controller)
