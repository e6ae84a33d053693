"""What every application of assay has: answers to unknown paths, and the routes that operators expect."""

from collections.abc import Callable
from typing import Any, Literal

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

from assay._version import __version__
from assay.poc.net.feed import Feed
from assay.poc.net.metrics import CONTENT_TYPE, Exported
from assay.poc.net.routes import Problem, Scope, needs, not_found, problems


class Health(BaseModel):
    """The process answers."""

    model_config = ConfigDict(extra="allow")

    status: Literal["ok"]


class Ready(BaseModel):
    """The model is loaded."""

    model_config = ConfigDict(extra="allow")

    ready: bool


def new_app(title: str, **options: Any) -> FastAPI:
    """Return an application without routes. Its documents, if any, are for a router to serve."""
    app = FastAPI(title=title, version=__version__, docs_url=None, redoc_url=None, openapi_url=None, **options)
    app.add_exception_handler(HTTPException, not_found)
    return app


def operations_router(
    feed: Feed, exported: Exported, check_ready: Callable[[], None], kind_of_route: type[APIRoute], under: str = ""
) -> APIRouter:
    """Return ``/health``, ``/ready`` and ``/metrics``, behind the path ``under``.

    Args:
        feed: Snapshots, which the metrics show.
        exported: Metrics of the application.
        check_ready: Function that raises a refusal with 503 while something is missing.
        kind_of_route: Class of the routes.
        under: Path before the names.
    """
    router = APIRouter(prefix=under, tags=["operations"], route_class=kind_of_route)

    @router.get("/health", response_model=Health)
    async def health() -> Response:
        """Answer while the process lives."""
        return JSONResponse({"status": "ok"})

    @router.get("/ready", response_model=Ready, responses={503: {"model": Problem}})
    async def ready() -> Response:
        """Answer 200 once the model is loaded and nothing has failed."""
        check_ready()
        return JSONResponse({"ready": True})

    @router.get("/metrics", responses=problems(), openapi_extra=needs(Scope.READ))
    async def metrics() -> Response:
        """Return the Prometheus metrics."""
        exported.show(feed.values)
        return Response(exported.text(), media_type=CONTENT_TYPE)

    return router
