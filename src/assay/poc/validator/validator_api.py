"""The application of a validator: intake of messages, queries, and the page.

Nodes send signed messages, or are asked for their nonces. A message is taken before routing,
checked against the pins, and answered once it is on disk. Routing, parameters and a response object
of the framework would cost more processor time than the check of a message.
"""

from collections.abc import Callable
from itertools import chain, islice
from typing import Annotated

import structlog
from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field

from assay.poc.net.application import (
    Feed,
    assemble_page,
    new_app,
    operations_router,
    page_router,
    run_with,
)
from assay.poc.net.deployment import Deployment
from assay.poc.net.keys import Keys, Scope
from assay.poc.net.local_only import LocalOnly
from assay.poc.net.refusals import Refusal
from assay.poc.net.routes import route_class
from assay.poc.net.server import listen, run_app
from assay.poc.net.server_settings import ServerSettings, check_host, is_loopback
from assay.poc.protocol.checks import MAX_NONCE
from assay.poc.validator.intake import PREFIX, Intake
from assay.poc.validator.poller import Poller
from assay.poc.validator.recomputer import account_id
from assay.poc.validator.validator_controller import ValidatorController
from assay.poc.validator.validator_settings import ValidatorSettings

log = structlog.get_logger("assay.validator")


MOST_EPOCHS = 1000
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
    page = assemble_page(
        "assay.poc.validator",
        brand="Validator",
        name="validator",
        mark="d='M3 8.5 7 12l6-8' stroke-width='1.8'",
    )
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

    @router.get("/status", response_model=None, openapi_extra=Scope.READ.extra)
    async def status() -> Response:
        """Return what the validator does, and what it accepts."""
        return JSONResponse(
            {name: value for name, value in feed.values.items() if name not in ("nodes", "changes")}
        )

    @router.get("/events", response_model=None, openapi_extra=Scope.READ.extra)
    async def events(request: Request) -> Response:
        """Stream a snapshot per second as server-sent events."""
        return await feed.respond(request)

    @router.get("/nodes", response_model=None, openapi_extra=Scope.READ.extra)
    def nodes(after: After = 0, limit: Limit = 100) -> Response:
        """Return nodes, those with the strongest evidence of anything wrong first; ``after`` skips
        so many.
        """
        listed = controller.nodes()
        return JSONResponse({"total": len(listed), "nodes": listed[after : after + limit]})

    @router.get("/verdicts", response_model=None, openapi_extra=Scope.READ.extra)
    def verdicts(after: After = 0, limit: Limit = 100) -> Response:
        """Return changes of verdicts with an id above ``after``, the oldest first."""
        return JSONResponse({"verdicts": controller.inbox.verdicts(limit, after=after)})

    @router.get("/evidence/{account}", response_model=None, openapi_extra=Scope.READ.extra)
    def evidence(account: str, after: After = 0, limit: Limit = 100) -> Response:
        """Return entries of an account in the ledger, with a place above ``after`` among them, the
        oldest first.
        """
        # Also those of builds that the pins no longer name.
        known_accounts = chain(
            (standing.account for standing in controller.worker.standings.values()),
            controller.ledger.accounts(),
        )
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
        return JSONResponse(
            {
                "commitments": controller.inbox.epochs(limit),
                "ledger": {"entries": count, "head": head},
            }
        )

    @router.get("/blocks", response_model=None, openapi_extra=Scope.READ.extra)
    def blocks() -> Response:
        """Return the open blocks, the newest first."""
        return JSONResponse({"blocks": controller.blocks()})

    @router.post("/blocks", response_model=None, openapi_extra=Scope.CONTROL.extra)
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
        ModelError: The model cannot be loaded, or its engine keeps failing.
    """
    check_host(host, server)
    with listen(host, port) as listener:
        controller = ValidatorController(
            load, settings, server, reference=reference, signed=not is_loopback(host)
        )
        run_app(create_app(controller), server, listener, runtime=controller)
