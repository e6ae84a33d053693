"""The application, alone or mounted in another: published routes and operators' routes."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi.routing import APIRoute

from assay.files.jsonl import JsonObject
from assay.poc.net.answers import SAFE_HEADERS
from assay.poc.net.application import (
    Feed,
    assemble_page,
    new_app,
    operations_router,
    page_router,
    part,
    run_with,
)
from assay.poc.net.deployment import Deployment
from assay.poc.net.keys import Keys, Scope
from assay.poc.net.local_only import LocalOnly
from assay.poc.net.routes import problems, route_class
from assay.poc.net.server import listen, run_app
from assay.poc.net.server_settings import check_host
from assay.poc.protocol.checks import MAX_NONCE
from assay.poc.service import reply_bodies as replies
from assay.poc.service import request_bodies as requests
from assay.poc.service.chain_api import CHAIN_PREFIX, chain_router, describe_config
from assay.poc.service.outbox import Delivery
from assay.poc.service.receipt_keeper import RECEIPTS_PREFIX, receipts_router
from assay.poc.service.service_controller import Controller
from assay.poc.service.service_settings import ServiceSettings

PREFIX = "/api/v1/pow"
"""Path of the published API."""
PREFIXES = (PREFIX, CHAIN_PREFIX, RECEIPTS_PREFIX)
"""Where the paths of the service begin, the pages and the probes aside."""

# The pages of the service need nothing from elsewhere and may not be framed.
PAGE_HEADERS = SAFE_HEADERS | {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src "
    "'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors "
    "'none'",
    "Referrer-Policy": "no-referrer",
}


def describe_status(controller: Controller, after: int | None = None, limit: int = 0) -> JsonObject:
    """Return state and counts in the fields of both published forms, with the latest valid nonces.

    With ``after`` these are the first ``limit`` above it, from the database.
    """
    progress = controller.progress
    state = str(controller.state)
    latest = [] if progress is None else progress.latest(after, limit)
    has_distances = progress is not None and not progress.publishes_vectors
    return {
        "state": state,
        "valid_nonces": [nonce for nonce, _ in latest],
        "valid_distances": [distance for _, distance in latest] if has_distances else [],
        "total_checked": progress.checked if progress else 0,
        "total_valid": progress.valid if progress else 0,
        "elapsed_seconds": progress.seconds if progress else 0.0,
        "rate_per_second": progress.rate if progress else 0.0,
        "r_target": progress.stored.r_target if progress else None,
        "status": state,
        "config": describe_config(controller),
        "stats": {"total_processed": progress.checked, "nonces_per_second": progress.rate}
        if progress
        else None,
        "ready": controller.deployment is not None,
        "paused": controller.paused,
        "error": controller.error,
    }


def create_app(controller: Controller) -> FastAPI:
    """Return the whole service: the published API, operations, docs and the dashboard.

    The controller is started when the application starts and closed when it ends.
    """
    app = new_app(
        "assay: Proof of Compute",
        summary="The published API under /api/v1/pow, durable and bounded, and receipts.",
    )
    _mount(app, controller, operations=True)
    app.include_router(dashboard_router())

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> JSONResponse:
        return JSONResponse(app.openapi(), headers=SAFE_HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(part("docs.html", "assay.poc.service"), headers=PAGE_HEADERS)

    if not controller.settings.has_keys:
        app.add_middleware(LocalOnly)
    return app


def attach(
    app: FastAPI, controller: Controller, *, operations: bool = False, under: str = ""
) -> None:
    """Mount the published API into another application, which keeps its own routes as they are.

    Call it before the application starts. ``operations`` adds ``/health``, ``/ready`` and
    ``/metrics``, behind the path ``under`` where the application has its own.
    """
    _mount(app, controller, operations=operations, under=under)
    if not controller.settings.has_keys:
        app.add_middleware(LocalOnly, prefix=PREFIXES)


def _mount(app: FastAPI, controller: Controller, *, operations: bool, under: str = "") -> None:
    """Do what :func:`attach` does, but for :class:`LocalOnly`."""
    feed = Feed(controller)
    settings = controller.settings
    keys = Keys(settings)
    kind_of_route = route_class(keys, settings, controller.metrics)
    of_chain = route_class(keys, settings, controller.metrics, untyped=True)
    app.include_router(chain_router(controller, of_chain))
    published = _pow_router(controller, feed, kind_of_route)
    if settings.compatibility == "gonka":
        chain = chain_router(controller, of_chain, prefix=PREFIX)
        # Of two routes alike the first answers here, and the last one inside vLLM.
        paths = [_named(route) for route in chain.routes]
        published.routes[:] = [route for route in published.routes if _named(route) not in paths]
        app.include_router(chain)
    app.include_router(published)
    app.include_router(receipts_router(controller, controller.receipts, kind_of_route))
    if operations:
        app.include_router(operations_router(controller, feed, kind_of_route, under))
    delivery = Delivery(controller.outbox, controller, settings, controller.metrics)
    run_with(app, controller, feed, delivery.run)


def _named(route: object) -> tuple[str, list[str]]:
    """Return path and methods of a route."""
    assert isinstance(route, APIRoute)
    return route.path, sorted(route.methods or ())


def _pow_router(controller: Controller, feed: Feed, kind_of_route: type[APIRoute]) -> APIRouter:
    """Return the routes of the published API. Handlers that block are plain functions, which run in
    threads.
    """
    router = APIRouter(prefix=PREFIX, tags=["PoC"], route_class=kind_of_route)
    works = problems(400, 409, 413, 422, 429, 503)
    change: dict[str, Any] = {
        "response_model": replies.InitReply,
        "openapi_extra": Scope.CONTROL.extra,
        "responses": problems(400, 409, 413, 422, 503),
    }
    of_job: dict[str, Any] = {
        "response_model": replies.JobReply,
        "openapi_extra": Scope.VALIDATE.extra,
    }

    def moved(call: Callable[..., None], *arguments: object) -> Response:
        call(*arguments)
        return JSONResponse({"status": "OK", "pow_status": describe_status(controller)})

    @router.post("/init", **change)
    def init(body: requests.InitRequest) -> Response:
        """Begin a round, and stay idle."""
        return moved(controller.init, body, "init")

    @router.post("/init/generate", **change)
    def init_generate(body: requests.AnyInit) -> Response:
        """Begin a round and generate: distances with ``r_target``, vectors with ``params``."""
        return moved(controller.init, body, "init/generate")

    @router.post("/init/validate", **change)
    def init_validate(body: requests.InitRequest) -> Response:
        """Begin a round and accept validations of its block."""
        return moved(controller.init, body, "init/validate")

    @router.post("/phase/generate", **change)
    def phase_generate() -> Response:
        """Generate; the round continues at its next nonce."""
        return moved(controller.phase, "phase/generate")

    @router.post("/phase/validate", **change)
    def phase_validate() -> Response:
        """Stop generating and accept validations."""
        return moved(controller.phase, "phase/validate")

    @router.post("/stop", **(change | {"responses": problems(503)}))
    def stop() -> Response:
        """Stop generating and validating. Callbacks that are owed are still delivered."""
        return moved(controller.stop)

    @router.post(
        "/validate",
        response_model=replies.ValidateReply,
        responses=works,
        openapi_extra=Scope.VALIDATE.extra,
    )
    async def validate(body: requests.ValidateRequest, request: Request) -> Response:
        """Recompute distances and judge them."""
        future = await controller.call(controller.validate, body, request.state.client)
        return JSONResponse(await asyncio.wrap_future(future))

    @router.get(
        "/status",
        response_model=replies.Status,
        responses=problems(422),
        openapi_extra=Scope.READ.extra,
    )
    async def status(
        after: Annotated[int | None, Query(ge=-1, le=MAX_NONCE)] = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    ) -> Response:
        """Return state and counts. With ``after``, the first ``limit`` valid nonces above it, for
        clients that pull.
        """
        if after is None:
            return JSONResponse(describe_status(controller))
        return JSONResponse(await controller.call(describe_status, controller, after, limit))

    @router.get("/snapshot", responses=problems(), openapi_extra=Scope.READ.extra)
    async def snapshot() -> Response:
        """Return the latest snapshot, the same object as an event."""
        return Response(feed.latest, media_type="application/json")

    @router.get(
        "/events",
        responses=problems(429),
        response_class=StreamingResponse,
        openapi_extra=Scope.READ.extra,
    )
    async def events(request: Request) -> Response:
        """Stream a snapshot per second as server-sent events."""
        return await feed.respond(request)

    @router.post("/generate", responses=works | {202: {"model": replies.JobReply}}, **of_job)
    async def generate(body: requests.GenerateRequest, request: Request) -> Response:
        """Queue an artifact job. With ``wait``, answer with its result, or 202 where that takes too
        long.
        """
        state, late = await controller.run_job(body, request.state.client)
        return JSONResponse(state, status_code=202 if late else 200)

    @router.get("/generate/{request_id}", responses=problems(404, 422), **of_job)
    def job(request_id: str) -> Response:
        """Return the state of an artifact job."""
        return JSONResponse(controller.jobs.state(request_id))

    @router.delete("/generate/{request_id}", responses=problems(404, 422, 503), **of_job)
    def cancel(request_id: str) -> Response:
        """Cancel an artifact job that is not finished."""
        return JSONResponse(controller.jobs.cancel(request_id))

    return router


def dashboard_router() -> APIRouter:
    """Return the route of the service's page."""
    return page_router(*render_page())


def render_page() -> tuple[str, dict[str, str]]:
    """Return the page and the headers that it is served with."""
    return assemble_page(
        "assay.poc.service.dashboard",
        brand="Proof of Compute",
        name="service",
        mark="d='M2 12C6 12 6 4 8 4s2 8 6 8' stroke-width='1.6'",
    )


def serve(
    load: Callable[[], Deployment], settings: ServiceSettings, *, host: str, port: int
) -> None:
    """Serve until SIGTERM or SIGINT; port 0 takes a free one, which the log names.

    Raises:
        UsageError: A host that others reach without a key, or an address that cannot be bound.
        StorageError: The data directory is in use or cannot be written.
        ModelError: The model cannot be loaded.
    """
    check_host(host, settings)
    with listen(host, port) as listener:
        controller = Controller(load, settings)
        run_app(create_app(controller), settings, listener, runtime=controller)
