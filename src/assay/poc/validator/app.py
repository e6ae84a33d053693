"""The application of a validator: what operators and nodes may ask it, the page, and the way in for messages."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import islice
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from assay._version import __version__
from assay.errors import AssayError, UsageError
from assay.files.jsonl import JsonObject, dumps
from assay.poc.net.broadcast import Broadcast
from assay.poc.net.lifespan import running
from assay.poc.net.refusals import Refusal
from assay.poc.net.routes import Bodies, Keys, LocalOnly, Scope, guarded, is_loopback, needs, not_found
from assay.poc.net.server import check_host, listen, run_app
from assay.poc.protocol.round import MAX_NONCE
from assay.poc.service.deployment import Deployment
from assay.poc.service.metrics import CONTENT_TYPE
from assay.poc.service.page import SHARED, assemble_page, page_router, part
from assay.poc.service.settings import Settings
from assay.poc.validator.controller import Controller
from assay.poc.validator.intake import PREFIX, Intake
from assay.poc.validator.poll import Poller
from assay.poc.validator.registry import Registry
from assay.poc.validator.settings import ValidatorSettings
from assay.poc.validator.worker import account_id
from assay.poc.verdict.ledger_entries import Account

log = structlog.get_logger("assay.validator")

PERIOD = 1.0
MOST_EPOCHS = 1000
READ, CONTROL = needs(Scope.READ), needs(Scope.CONTROL)
After = Annotated[int, Query(ge=0, le=MAX_NONCE)]
Limit = Annotated[int, Query(ge=1, le=1000)]


class BlockBody(BaseModel):
    """A block of which messages are accepted from now on."""

    model_config = ConfigDict(extra="forbid", strict=True)

    block_hash: str
    block_height: Annotated[int, Field(ge=0, le=MAX_NONCE)]


def create_app(controller: Controller) -> FastAPI:
    """Return a validator as an application, which starts and closes the controller."""
    feed = _Feed(controller)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with running(controller, feed.refresh, feed.run, Poller(controller).run):
            yield

    app = FastAPI(
        title="assay: validator",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
    )
    app.add_exception_handler(HTTPException, not_found)
    service = controller.service
    kind_of_route = guarded(Keys(service), Bodies(service.max_body, service.max_bodies), controller.metrics)
    calls = _Calls(controller, feed)
    app.include_router(_validator_router(calls, kind_of_route))
    app.include_router(_operations_router(controller, feed, kind_of_route))
    app.include_router(_page_router())
    app.add_middleware(Intake, controller=controller)
    if not service.has_keys:
        app.add_middleware(LocalOnly)
    return app


class _Feed(Broadcast):
    """Makes a snapshot every second, for the page, the metrics and ``/status``."""

    def __init__(self, controller: Controller) -> None:
        service = controller.service
        super().__init__(controller.closing, most=service.max_streams, most_of_client=service.max_client_streams)
        self._controller = controller
        self.values: JsonObject = {}

    async def run(self) -> None:
        """Refresh until cancelled, and read pins and nodes again where they have changed."""
        while True:
            await asyncio.sleep(PERIOD)
            try:
                await asyncio.to_thread(self._controller.reread)
                await self.refresh()
            except AssayError as error:
                log.warning("snapshot", reason=error.seen)

    async def refresh(self) -> None:
        """Make a snapshot now."""
        self.values = await asyncio.to_thread(self._controller.snapshot)
        await self.publish(dumps(self.values).encode())


class _Calls:
    """The handlers under ``/api/v1/validator``. Those that read the database are plain functions, called in threads."""

    def __init__(self, controller: Controller, feed: _Feed) -> None:
        self._controller, self._feed = controller, feed

    async def status(self) -> Response:
        """Return what the validator does, and what it accepts."""
        hidden = ("nodes", "changes")
        return JSONResponse({name: value for name, value in self._feed.values.items() if name not in hidden})

    async def events(self, request: Request) -> Response:
        """Stream a snapshot per second as server-sent events."""
        client = request.client.host if request.client else ""
        stream = await self._feed.stream((client, request.headers.get("authorization")))
        return StreamingResponse(stream, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    def nodes(self, after: After = 0, limit: Limit = 100) -> Response:
        """Return nodes, those with the strongest evidence of anything wrong first; ``after`` skips so many."""
        nodes = self._controller.nodes()
        return JSONResponse({"total": len(nodes), "nodes": nodes[after : after + limit]})

    def verdicts(self, after: After = 0, limit: Limit = 100) -> Response:
        """Return changes of verdicts with an id above ``after``, the oldest first."""
        return JSONResponse({"verdicts": self._controller.inbox.verdicts(after, limit)})

    def evidence(self, account: str, after: After = 0, limit: Limit = 100) -> Response:
        """Return entries of an account in the ledger, with a place above ``after`` among them, the oldest first."""
        found = self._account(account)
        entries = islice(self._controller.ledger.entries(found), after, after + limit)
        count, head = self._controller.ledger.head
        return JSONResponse(
            {
                "account": vars(found),
                "ledger": {"entries": count, "head": head},
                "entries": [entry.model_dump() | {"hash": entry.hash} for entry in entries],
            }
        )

    def _account(self, account: str) -> Account:
        for standing in self._controller.worker.standings.values():
            if account_id(standing.account) == account:
                return standing.account
        for known in self._controller.ledger.accounts():  # those of builds and models that the pins no longer name
            if account_id(known) == account:
                return known
        raise Refusal(404, "no such account", wanted="an account of /nodes", do="ask /api/v1/validator/nodes")

    def commitments(self, limit: Annotated[int, Query(ge=1, le=MOST_EPOCHS)] = 100) -> Response:
        """Return commitments, the newest first, with the secrets of epochs that have ended. It needs no key."""
        return JSONResponse({"commitments": self._controller.inbox.epochs(limit)})

    def blocks(self) -> Response:
        """Return the open blocks, the newest first."""
        found = self._controller.open_blocks.items()
        return JSONResponse({"blocks": [{"block_hash": name, "block_height": height} for name, height in found]})

    def announce(self, body: BlockBody) -> Response:
        """Open a block: messages of it are accepted from now on."""
        new = self._controller.announce(body.block_hash, body.block_height)
        log.info("block", block_hash=body.block_hash, block_height=body.block_height, new=new)
        return JSONResponse({"status": "OK", "new": new})


def _validator_router(calls: _Calls, kind_of_route: Any) -> APIRouter:
    router = APIRouter(prefix=PREFIX, route_class=kind_of_route)
    readers: tuple[tuple[str, Callable[..., Any]], ...] = (
        ("/status", calls.status),
        ("/events", calls.events),
        ("/nodes", calls.nodes),
        ("/verdicts", calls.verdicts),
        ("/evidence/{account}", calls.evidence),
        ("/blocks", calls.blocks),
    )
    for path, call in readers:
        router.get(path, response_model=None, openapi_extra=READ)(call)
    router.get("/commitments", response_model=None)(calls.commitments)
    router.post("/blocks", response_model=None, openapi_extra=CONTROL)(calls.announce)
    return router


def _operations_router(controller: Controller, feed: _Feed, kind_of_route: Any) -> APIRouter:
    router = APIRouter(route_class=kind_of_route)

    @router.get("/health")
    async def health() -> Response:
        """Answer while the process lives."""
        return JSONResponse({"status": "ok"})

    @router.get("/ready")
    async def ready() -> Response:
        """Answer 200 once the model is loaded and nothing has failed. Messages are taken before that."""
        if controller.error is not None or not controller.ready:
            seen = controller.error or "the model is being loaded"
            raise Refusal(503, seen, wanted="a loaded model, and no failure", do="wait, or see the log", retry_after=5)
        return JSONResponse({"ready": True})

    @router.get("/metrics", openapi_extra=READ)
    async def metrics() -> Response:
        """Return the Prometheus metrics."""
        controller.metrics.show(feed.values)
        return Response(controller.metrics.text(), media_type=CONTENT_TYPE)

    return router


def _page_router() -> APIRouter:
    package = "assay.poc.validator"
    page = assemble_page(
        part("page.html", package),
        brand="Validator",
        name="validator",
        mark="d='M3 8.5 7 12l6-8' stroke-width='1.8'",
        style=part("page.css") + part("page.css", package),
        script="".join(map(part, SHARED)) + part("page.js", package),
    )
    return page_router(*page)


def validate(
    load: Callable[[], Deployment],
    settings: ValidatorSettings,
    service: Settings,
    *,
    reference: str,
    host: str,
    port: int,
) -> None:
    """Run a validator until SIGTERM or SIGINT.

    Args:
        load: Function that loads the model and returns its deployment.
        settings: Settings of the validator.
        service: Settings that it shares with a service: keys, secrets, data directory, bounds.
        reference: Name of the model.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one, which the log names.

    Raises:
        UsageError: A host that others reach without keys or without secrets, or an address that cannot be bound.
        StorageError: The data directory is in use or cannot be written.
        DataError: The pins or the nodes file is wrong.
        ModelError: The model cannot be loaded.
    """
    check_host(host, service)
    registry = Registry.load(settings.pins, settings.nodes, service, model=reference)
    if not is_loopback(host) and registry.is_open:
        raise UsageError(
            f"--host {host} with nodes that sign nothing",
            wanted="a secret of every node where others reach the port",
            do="pass --callback-secret, or give each node its secrets in the file of --nodes",
        )
    with listen(host, port) as listener:
        controller = Controller(load, settings, service, reference=reference)
        run_app(create_app(controller), service, listener, controller=controller)
