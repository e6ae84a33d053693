"""The application, alone or inside another one."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from assay._version import __version__
from assay.poc.service.dashboard import dashboard_router
from assay.poc.service.http._auth import SAFE_HEADERS, Keys, LocalOnly
from assay.poc.service.http._feed import Feed, QuickStatus
from assay.poc.service.http._route import not_found
from assay.poc.service.http._routes import PREFIX, operations_router, pow_router
from assay.poc.service.runtime import Controller, Delivery

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
        summary="The published API under /api/v1/pow, durable and bounded.",
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
    if operations:
        app.include_router(operations_router(controller, keys, feed), prefix=under)
    app.add_middleware(QuickStatus, path=f"{PREFIX}/status", controller=controller, keys=keys, feed=feed)
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(host: FastAPI) -> AsyncIterator[Any]:
        async with inner(host) as state, _running(controller, feed):
            yield state

    app.router.lifespan_context = lifespan


@asynccontextmanager
async def _running(controller: Controller, feed: Feed) -> AsyncIterator[None]:
    await asyncio.to_thread(controller.start)
    await feed.refresh()
    tasks = [asyncio.create_task(feed.run()), asyncio.create_task(Delivery(controller).run())]
    try:
        yield
    finally:
        controller.closing.set()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await asyncio.to_thread(controller.close)


def _pages(app: FastAPI) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/openapi.json")
    async def openapi() -> JSONResponse:
        return JSONResponse(app.openapi(), headers=SAFE_HEADERS)

    @router.get("/docs")
    async def docs() -> HTMLResponse:
        text = resources.files("assay.poc.service.http").joinpath("docs.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers=PAGE_HEADERS)

    return router
