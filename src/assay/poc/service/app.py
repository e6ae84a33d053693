"""The application, alone or inside another one: the published routes, and those that operators expect."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import resources
from typing import Annotated, Any, ParamSpec

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from assay._version import __version__
from assay.poc.net.lifespan import running
from assay.poc.net.refusals import Refusal
from assay.poc.net.routes import SAFE_HEADERS, Keys, LocalOnly, Scope, needs, not_found, problems, route_class
from assay.poc.protocol.round import MAX_NONCE
from assay.poc.service.bodies import (
    AnyInit,
    GenerateRequest,
    Health,
    InitReply,
    InitRequest,
    JobReply,
    Problem,
    Ready,
    Status,
    ValidateReply,
    ValidateRequest,
)
from assay.poc.service.controller import Controller
from assay.poc.service.delivery import Delivery
from assay.poc.service.feed import Feed, QuickStatus, status_after
from assay.poc.service.feed import status as current_status
from assay.poc.service.metrics import CONTENT_TYPE
from assay.poc.service.page import dashboard_router
from assay.poc.service.receipt_routes import RECEIPTS_PREFIX, receipts_router
from assay.poc.service.states import State

P = ParamSpec("P")

PREFIX = "/api/v1/pow"
"""Path of the published API."""
PREFIXES = (PREFIX, RECEIPTS_PREFIX)
"""Where the paths of the service begin, the pages and the probes aside."""

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
    app = FastAPI(
        title="assay: Proof of Compute",
        version=__version__,
        summary="The published API under /api/v1/pow, durable and bounded, and receipts of responses.",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.add_exception_handler(HTTPException, not_found)
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
    keys, feed = Keys(controller.settings), Feed(controller)
    app.include_router(pow_router(controller, keys, feed))
    app.include_router(receipts_router(controller, keys))
    if operations:
        app.include_router(operations_router(controller, keys, feed, under))
    app.add_middleware(QuickStatus, path=f"{PREFIX}/status", controller=controller, keys=keys, feed=feed)
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(host: FastAPI) -> AsyncIterator[Any]:
        loops = (feed.run, Delivery(controller).run)
        async with inner(host) as state, running(controller, feed.refresh, *loops):
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


def pow_router(controller: Controller, keys: Keys, feed: Feed) -> APIRouter:
    """Return the routes of the published API."""
    calls = _Calls(controller, feed)
    router = APIRouter(prefix=PREFIX, tags=["PoC"], route_class=route_class(controller, keys))
    changes, works = problems(400, 409, 413, 422, 503), problems(400, 409, 413, 422, 429, 503)
    for path, call in (
        ("/init", calls.init),
        ("/init/generate", calls.init_generate),
        ("/init/validate", calls.init_validate),
        ("/phase/generate", calls.phase_generate),
        ("/phase/validate", calls.phase_validate),
        ("/stop", calls.stop),
    ):
        refusals = problems(503) if path == "/stop" else changes
        router.post(path, response_model=InitReply, responses=refusals, openapi_extra=CONTROL)(call)
    router.post("/validate", response_model=ValidateReply, responses=works, openapi_extra=VALIDATE)(calls.validate)
    router.get("/status", response_model=Status, responses=problems(422), openapi_extra=READ)(calls.status)
    router.get("/snapshot", responses=problems(), openapi_extra=READ)(calls.snapshot)
    events = router.get("/events", responses=problems(429), response_class=StreamingResponse, openapi_extra=READ)
    events(calls.events)
    job: dict[str, Any] = {"response_model": JobReply, "openapi_extra": VALIDATE}
    router.post("/generate", responses=works | {202: {"model": JobReply}}, **job)(calls.generate)
    router.get("/generate/{request_id}", responses=problems(404, 422), **job)(calls.job)
    router.delete("/generate/{request_id}", responses=problems(404, 422, 503), **job)(calls.cancel)
    return router


class _Calls:
    """The handlers of the published API. Those that block are plain functions, which FastAPI calls in threads."""

    def __init__(self, controller: Controller, feed: Feed) -> None:
        self._controller, self._feed = controller, feed

    def init(self, body: InitRequest) -> Response:
        """Begin a round, and stay idle."""
        return self._moved(self._controller.init, body, State.IDLE)

    def init_generate(self, body: AnyInit) -> Response:
        """Begin a round and generate: distances with ``r_target``, vectors with ``params``."""
        return self._moved(self._controller.init, body, State.GENERATING)

    def init_validate(self, body: InitRequest) -> Response:
        """Begin a round and accept validations of its block."""
        return self._moved(self._controller.init, body, State.VALIDATING)

    def phase_generate(self) -> Response:
        """Generate; the round continues at its next nonce."""
        return self._moved(self._controller.phase, "phase/generate")

    def phase_validate(self) -> Response:
        """Stop generating and accept validations."""
        return self._moved(self._controller.phase, "phase/validate")

    def stop(self) -> Response:
        """Stop generating and validating. Callbacks that are owed are still delivered."""
        return self._moved(self._controller.stop)

    def _moved(self, change: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> Response:
        change(*args, **kwargs)
        return JSONResponse({"status": "OK", "pow_status": current_status(self._controller)})

    async def validate(self, body: ValidateRequest) -> Response:
        """Recompute distances and judge them."""
        future = await self._controller.call(self._controller.validate, body)
        return JSONResponse(await asyncio.wrap_future(future))

    async def status(
        self,
        after: Annotated[int | None, Query(ge=-1, le=MAX_NONCE)] = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    ) -> Response:
        """Return state and counts. With ``after``, the first ``limit`` valid nonces above it, for clients that pull."""
        if after is None:
            return Response(self._feed.status(), media_type="application/json")
        return JSONResponse(await self._controller.call(status_after, self._controller, after, limit))

    async def snapshot(self) -> Response:
        """Return the latest snapshot, the same object as an event."""
        return Response(self._feed.latest, media_type="application/json")

    async def events(self, request: Request) -> Response:
        """Stream a snapshot per second as server-sent events."""
        client = request.client.host if request.client else ""
        # Behind a proxy all clients have one address, and those with keys are told apart by them.
        stream = await self._feed.stream((client, request.headers.get("authorization")))
        return StreamingResponse(stream, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    async def generate(self, body: GenerateRequest) -> Response:
        """Queue an artifact job. With ``wait``, answer with its result, or 202 where that takes too long."""
        queued = await self._controller.call(self._controller.submit, body)
        if not body.wait:
            return JSONResponse(queued)
        return await _wait_for_job(self._controller, queued)

    def job(self, request_id: str) -> Response:
        """Return the state of an artifact job."""
        return JSONResponse(self._controller.jobs.state(request_id))

    def cancel(self, request_id: str) -> Response:
        """Cancel an artifact job that is not finished."""
        return JSONResponse(self._controller.jobs.cancel(request_id))


async def _wait_for_job(controller: Controller, queued: dict[str, Any]) -> Response:
    job_id = queued["request_id"]
    future = await controller.call(controller.jobs.watch, job_id)
    try:
        async with asyncio.timeout(controller.settings.wait):
            return JSONResponse(await asyncio.wrap_future(future))
    except TimeoutError:
        return JSONResponse(await controller.call(controller.jobs.state, job_id), status_code=202)


def operations_router(controller: Controller, keys: Keys, feed: Feed, under: str) -> APIRouter:
    """Return ``/health``, ``/ready`` and ``/metrics``, behind a path."""
    router = APIRouter(prefix=under, tags=["operations"], route_class=route_class(controller, keys))

    @router.get("/health", response_model=Health)
    async def health() -> Response:
        """Answer while the process lives."""
        return JSONResponse({"status": "ok"})

    @router.get("/ready", response_model=Ready, responses={503: {"model": Problem}})
    async def ready() -> Response:
        """Answer 200 once the model is loaded and nothing has failed."""
        controller.ready()
        if controller.error is not None:
            raise Refusal(503, controller.error, wanted="no failure", do="see the log, then start the phase again")
        return JSONResponse({"ready": True})

    @router.get("/metrics", responses=problems(), openapi_extra=READ)
    async def metrics() -> Response:
        """Return the Prometheus metrics."""
        controller.metrics.show(feed.values)
        return Response(controller.metrics.text(), media_type=CONTENT_TYPE)

    return router
