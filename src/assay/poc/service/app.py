"""The application, alone or inside another one: the published routes, and those that operators expect."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import resources
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi.routing import APIRoute

from assay.poc.net.app import new_app, operations_router
from assay.poc.net.deployment import Deployment
from assay.poc.net.feed import Feed
from assay.poc.net.page import SHARED, assemble_page, page_router, part
from assay.poc.net.routes import SAFE_HEADERS, Keys, LocalOnly, Scope, needs, problems, route_class
from assay.poc.net.server import check_host, listen, run_app, running
from assay.poc.protocol.round import MAX_NONCE
from assay.poc.service.bodies import (
    AnyInit,
    GenerateRequest,
    InitReply,
    InitRequest,
    JobReply,
    Status,
    ValidateReply,
    ValidateRequest,
)
from assay.poc.service.controller import Controller
from assay.poc.service.delivery import Delivery
from assay.poc.service.receipts import RECEIPTS_PREFIX, receipts_router
from assay.poc.service.settings import Settings
from assay.poc.service.status import QuickStatus, StatusText, status_after
from assay.poc.service.status import status as current_status

PREFIX = "/api/v1/pow"
"""Path of the published API."""
PREFIXES = (PREFIX, RECEIPTS_PREFIX)
"""Where the paths of the service begin, the pages and the probes aside."""

DASHBOARD = "assay.poc.service.dashboard"
SCRIPTS = ("charts.js", "page.js")
"""The scripts of the page beside those of every page, in the order of their dependence."""

READ, VALIDATE, CONTROL = needs(Scope.READ), needs(Scope.VALIDATE), needs(Scope.CONTROL)

# The pages of the service need nothing from elsewhere and may not be framed.
PAGE_HEADERS = SAFE_HEADERS | {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


def create_app(controller: Controller) -> FastAPI:
    """Return the whole service: the published API, operations, docs and the dashboard.

    The controller is started when the application starts and closed when it ends.
    """
    summary = "The published API under /api/v1/pow, durable and bounded, and receipts of responses."
    app = new_app("assay: Proof of Compute", summary=summary)
    attach(app, controller, operations=True)
    app.include_router(_pages(app))
    app.include_router(dashboard_router())
    if not controller.settings.has_keys:
        app.add_middleware(LocalOnly)
    return app


def attach(app: FastAPI, controller: Controller, *, operations: bool = False, under: str = "") -> None:
    """Mount the published API into another application, which keeps its own routes as they are.

    Call it before the application starts. ``operations`` adds ``/health``, ``/ready`` and ``/metrics``, behind the
    path ``under`` where the application has its own.
    """
    settings, metrics = controller.settings, controller.metrics
    keys, feed, text = Keys(settings), Feed(controller), StatusText(controller)
    kind_of_route = route_class(keys, settings, metrics)
    app.include_router(_pow_router(controller, feed, text, kind_of_route))
    app.include_router(receipts_router(controller, controller.receipts, kind_of_route))
    if operations:
        app.include_router(operations_router(feed, metrics, controller.check_ready, kind_of_route, under))
    app.add_middleware(QuickStatus, path=f"{PREFIX}/status", controller=controller, keys=keys, text=text)
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(host: FastAPI) -> AsyncIterator[Any]:
        async with inner(host) as state, running(controller, feed, Delivery(controller).run):
            yield state

    app.router.lifespan_context = lifespan


def _pages(app: FastAPI) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/openapi.json")
    async def openapi() -> JSONResponse:
        return JSONResponse(app.openapi(), headers=SAFE_HEADERS)

    @router.get("/docs")
    async def docs() -> HTMLResponse:
        text = resources.files("assay.poc.service").joinpath("docs.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers=PAGE_HEADERS)

    return router


def _pow_router(controller: Controller, feed: Feed, text: StatusText, kind_of_route: type[APIRoute]) -> APIRouter:
    """Return the routes of the published API. Handlers that block are plain functions, which run in threads."""
    router = APIRouter(prefix=PREFIX, tags=["PoC"], route_class=kind_of_route)
    works = problems(400, 409, 413, 422, 429, 503)
    change: dict[str, Any] = {"response_model": InitReply, "openapi_extra": CONTROL}
    change["responses"] = problems(400, 409, 413, 422, 503)
    of_job: dict[str, Any] = {"response_model": JobReply, "openapi_extra": VALIDATE}

    def moved() -> Response:
        return JSONResponse({"status": "OK", "pow_status": current_status(controller)})

    @router.post("/init", **change)
    def init(body: InitRequest) -> Response:
        """Begin a round, and stay idle."""
        controller.init(body, "init")
        return moved()

    @router.post("/init/generate", **change)
    def init_generate(body: AnyInit) -> Response:
        """Begin a round and generate: distances with ``r_target``, vectors with ``params``."""
        controller.init(body, "init/generate")
        return moved()

    @router.post("/init/validate", **change)
    def init_validate(body: InitRequest) -> Response:
        """Begin a round and accept validations of its block."""
        controller.init(body, "init/validate")
        return moved()

    @router.post("/phase/generate", **change)
    def phase_generate() -> Response:
        """Generate; the round continues at its next nonce."""
        controller.phase("phase/generate")
        return moved()

    @router.post("/phase/validate", **change)
    def phase_validate() -> Response:
        """Stop generating and accept validations."""
        controller.phase("phase/validate")
        return moved()

    @router.post("/stop", **(change | {"responses": problems(503)}))
    def stop() -> Response:
        """Stop generating and validating. Callbacks that are owed are still delivered."""
        controller.stop()
        return moved()

    @router.post("/validate", response_model=ValidateReply, responses=works, openapi_extra=VALIDATE)
    async def validate(body: ValidateRequest) -> Response:
        """Recompute distances and judge them."""
        future = await controller.call(controller.validate, body)
        return JSONResponse(await asyncio.wrap_future(future))

    @router.get("/status", response_model=Status, responses=problems(422), openapi_extra=READ)
    async def status(
        after: Annotated[int | None, Query(ge=-1, le=MAX_NONCE)] = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    ) -> Response:
        """Return state and counts. With ``after``, the first ``limit`` valid nonces above it, for clients that pull."""
        if after is None:
            return Response(text.latest(), media_type="application/json")
        return JSONResponse(await controller.call(status_after, controller, after, limit))

    @router.get("/snapshot", responses=problems(), openapi_extra=READ)
    async def snapshot() -> Response:
        """Return the latest snapshot, the same object as an event."""
        return Response(feed.latest, media_type="application/json")

    @router.get("/events", responses=problems(429), response_class=StreamingResponse, openapi_extra=READ)
    async def events(request: Request) -> Response:
        """Stream a snapshot per second as server-sent events."""
        return await feed.respond(request)

    @router.post("/generate", responses=works | {202: {"model": JobReply}}, **of_job)
    async def generate(body: GenerateRequest) -> Response:
        """Queue an artifact job. With ``wait``, answer with its result, or 202 where that takes too long."""
        queued = await controller.call(controller.submit, body)
        if not body.wait:
            return JSONResponse(queued)
        future = await controller.call(controller.jobs.watch, queued["request_id"])
        try:
            async with asyncio.timeout(controller.settings.wait):
                return JSONResponse(await asyncio.wrap_future(future))
        except TimeoutError:
            return JSONResponse(await controller.call(controller.jobs.state, queued["request_id"]), status_code=202)

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
        part("page.html", DASHBOARD),
        brand="Proof of Compute",
        name="service",
        mark="d='M2 12C6 12 6 4 8 4s2 8 6 8' stroke-width='1.6'",
        script="".join(map(part, SHARED)) + "".join(part(name, DASHBOARD) for name in SCRIPTS),
    )


def serve(load: Callable[[], Deployment], settings: Settings, *, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        load: Loads the model and returns its deployment.
        settings: Settings of the service.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one, which the log names.

    Raises:
        UsageError: A host that others reach without a key, or an address that cannot be bound.
        StorageError: The data directory is in use or cannot be written.
        ModelError: The model cannot be loaded.
    """
    check_host(host, settings)
    with listen(host, port) as listener:
        controller = Controller(load, settings)
        run_app(create_app(controller), settings, listener, runtime=controller)
