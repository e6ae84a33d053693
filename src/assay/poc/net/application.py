"""What every application has: its runtime, snapshots, a page, and the operators' routes."""

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import resources
from string import Template
from typing import Any

import structlog
from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import StreamingResponse

from assay._version import __version__
from assay.errors import AssayError
from assay.files.jsonl import JsonObject, dumps
from assay.poc.net.answers import not_found
from assay.poc.net.keys import Scope
from assay.poc.net.metrics import CONTENT_TYPE
from assay.poc.net.routes import HEAD, HeadRoute, Problem, problems
from assay.poc.net.runtime import Runtime
from assay.poc.net.shares import Shares

log = structlog.get_logger("assay.app")

PERIOD = 1.0  # seconds between two snapshots
PAUSE = 1.0  # seconds before a loop that failed begins again
SHARED = ("stream.js", "words.js", "dom.js", "link.js")
"""Scripts that every page of assay begins with, in the order of their dependence."""


class Feed:
    """Takes a snapshot of a runtime every second for event streams, metrics and pages."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._changed = asyncio.Condition()
        self._streams = Shares(runtime.server.max_streams, runtime.server.max_client_streams)
        self.values: JsonObject = {}
        """The latest snapshot."""
        self.latest = b""
        """The latest snapshot, as JSON."""

    async def run(self) -> None:
        """Refresh every second until cancelled, and let the runtime do what is due."""
        while True:
            await asyncio.sleep(PERIOD)
            try:
                await self.refresh()
                await self._runtime.call(self._runtime.tend)
            except AssayError as error:
                log.warning("snapshot", reason=error.seen)

    async def refresh(self) -> None:
        """Make a snapshot now, and give it to every open stream."""
        self.values = await self._runtime.call(self._runtime.snapshot)
        async with self._changed:
            self.latest = dumps(self.values).encode()
            self._changed.notify_all()

    async def stream(self, client: str | None = None) -> AsyncIterator[bytes]:
        """Return server-sent events until the reader ``client`` leaves; 429 beyond its limit."""
        events = self._events(client)
        # Counts the stream before another reader is looked at: nothing is waited for here.
        await anext(events)
        return events

    async def respond(self, request: Request) -> Response:
        """Return a stream as the answer to a request."""
        headers = {"X-Accel-Buffering": "no", "Content-Type": "text/event-stream; charset=utf-8"}
        if HEAD in request.scope:
            return Response(headers=headers)
        return StreamingResponse(await self.stream(request.state.client), headers=headers)

    async def _events(self, client: str | None) -> AsyncIterator[bytes]:
        with self._streams.held(
            client, "event streams", do="close one, or poll /status", retry_after=10
        ):
            yield b""  # taken by stream()
            yield b"retry: 2000\n\n"
            while not self._runtime.closing.is_set():
                yield b"event: snapshot\ndata: " + self.latest + b"\n\n"
                async with self._changed:
                    await self._changed.wait()


def new_app(title: str, **options: Any) -> FastAPI:
    """Return an application without routes. Its documents, if any, are for a router to serve."""
    app = FastAPI(
        title=title, version=__version__, docs_url=None, redoc_url=None, openapi_url=None, **options
    )
    app.router.route_class = HeadRoute
    app.add_exception_handler(HTTPException, not_found)
    return app


def run_with(
    app: FastAPI, runtime: Runtime, feed: Feed, *loops: Callable[[], Awaitable[None]]
) -> None:
    """Let a runtime, its feed and further loops begin and end with an application."""
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(host: FastAPI) -> AsyncIterator[Any]:
        async with inner(host) as state:
            await asyncio.to_thread(runtime.start)
            tasks: list[asyncio.Task[None]] = []
            try:
                await feed.refresh()
                tasks += [asyncio.create_task(kept_running(loop)) for loop in (feed.run, *loops)]
                yield state
            finally:
                runtime.closing.set()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await asyncio.to_thread(runtime.close)

    app.router.lifespan_context = lifespan


async def kept_running(loop: Callable[[], Awaitable[None]]) -> None:
    """Run a loop until it is cancelled, and log and repeat it where it fails."""
    while True:
        try:
            await loop()
        except Exception:  # of any kind, from code that this module does not know
            log.exception("a loop failed, and begins again")
        await asyncio.sleep(PAUSE)


def operations_router(
    runtime: Runtime, feed: Feed, kind_of_route: type[APIRoute], under: str = ""
) -> APIRouter:
    """Return ``/health``, ``/ready`` and ``/metrics`` of a runtime, behind the path ``under``."""
    router = APIRouter(prefix=under, tags=["operations"], route_class=kind_of_route)

    @router.get("/health", response_model=dict[str, str])
    async def health() -> Response:
        """Answer while the process lives."""
        return JSONResponse({"status": "ok"})

    @router.get("/ready", response_model=dict[str, bool], responses={503: {"model": Problem}})
    async def ready() -> Response:
        """Answer 200 once the model is loaded and nothing has failed."""
        runtime.check_ready()
        return JSONResponse({"ready": True})

    @router.get("/metrics", responses=problems(), openapi_extra=Scope.READ.extra)
    async def metrics() -> Response:
        """Return the Prometheus metrics."""
        return Response(runtime.metrics.text(feed.values), media_type=CONTENT_TYPE)

    return router


def page_router(page: str, headers: dict[str, str]) -> APIRouter:
    """Return the route ``/``, a page without data: it reads the event stream, which needs a key."""
    router = APIRouter(include_in_schema=False, route_class=HeadRoute)

    @router.get("/")
    async def dashboard() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    return router


def assemble_page(package: str, *, brand: str, name: str, mark: str) -> tuple[str, dict[str, str]]:
    """Return a page with its frame, style and script, and the headers that it is served with.

    Palette and type are those of the reports. Style and script are allowed by their hash, so that
    nothing else runs, whatever a block hash or a key may hold.

    Args:
        package: Package with the page's ``page.html``, its scripts in the order of their names, and
            its style, if any.
        brand: Title of the page.
        name: Word for what the page shows.
        mark: Attributes of the path in its icon.
    """
    files = sorted(file.name for file in resources.files(package).iterdir())
    files_by_kind = {
        kind: [part(file, package) for file in files if file.endswith(kind)]
        for kind in (".css", ".js")
    }
    style = part("report.css", "assay.pages") + part("page.css") + "".join(files_by_kind[".css"])
    script = "".join([*map(part, SHARED), *files_by_kind[".js"]])
    page = Template(part("frame.html")).substitute(
        body=part("page.html", package),
        brand=brand,
        name=name,
        mark=mark,
        style=style,
        script=script,
    )
    policy = (
        f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; img-src "
        f"data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return page, headers


def part(name: str, package: str = "assay.poc.net.assets") -> str:
    """Return a text file of a package: a script, a style or a page."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    """Return the hash that allows an inline element with this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
