"""The service inside a vLLM server: an entry point of ``vllm.endpoint_plugins``.

vLLM calls :meth:`AssayPlugin.attach_router` when the engine runs, then :meth:`AssayPlugin.init_state`, and then starts
the application, with it the controller and everything durable. ``--api-key`` of vLLM does not guard ``/api/v1/pow``:
the service has keys of its own.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from assay.models.load import identify
from assay.poc.net.deployment import Deployment
from assay.poc.net.logs import configure_logs
from assay.poc.net.routes import Keys, LocalOnly, Scope, needs, route_class, route_path
from assay.poc.net.server import kept_running
from assay.poc.protocol.builds import with_cache
from assay.poc.service.app import PREFIX, PREFIXES, attach, dashboard_router
from assay.poc.service.controller import Controller
from assay.poc.vllm.client import Client
from assay.poc.vllm.compatibility import check_config, check_installed, check_responses
from assay.poc.vllm.engine import RequestEngine, capacity, most_positions
from assay.poc.vllm.preflight import PluginSettings, check_arguments, check_key
from assay.poc.vllm.response_routes import WITHOUT_ENGINE, ReceiptMiddleware, Responses, responses_router
from assay.poc.vllm.servers import PassOn, Place, Shared, serve_owner
from assay.poc.vllm.throttle import Throttle

PATIENCE = 5.0  # seconds in which the nonces that run are given up before vLLM ends its engine

MESSAGE = "Proof of Compute has this engine to itself for a while"
BODY = {"error": {"message": MESSAGE, "type": "service_unavailable", "param": None, "code": 503}}


@dataclass(frozen=True)
class _Running:
    """An engine that runs."""

    client: Client
    loop: asyncio.AbstractEventLoop
    version: str
    positions: int
    model: str
    reference: str


class AssayPlugin:
    """Mounts the service, and gives it an engine that runs nonces as requests."""

    name = "assay"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._running: Future[_Running] = Future()
        self._settings: PluginSettings | None = None
        self._responses: Responses | None = None
        self._shared: Shared | None = None
        self._place = Place()
        self._app: Any = None
        self._beside: list[asyncio.Task[None]] = []
        self.controller: Controller | None = None

    def attach_router(self, app: Any) -> None:
        """Mount routes, page and callbacks.

        Raises:
            UsageError: A setting is out of range, or the port needs a key. This aborts the start of the server.
            StorageError: The data directory is in use or cannot be written.
        """
        configure_logs("console")
        settings = self._settings = PluginSettings()
        check_arguments(app.state.args, settings)
        check_key(app.state.args, settings)
        self._app, self._place = app, Place.of(app.state.args)
        if self._place.owns:
            self._mount(app, settings)  # first, as it takes the lock of the data directory
        if self._place.count > 1:
            self._shared = Shared(settings.data_dir, self._place)
            if not self._place.owns:
                app.add_middleware(PassOn, prefix=PREFIXES, path=self._shared.path)
        app.include_router(dashboard_router())
        app.add_middleware(ChatBarrier, prefix=PREFIXES, closed=self._closed)
        if not settings.has_keys:
            app.add_middleware(LocalOnly, prefix=PREFIXES)

    def _mount(self, app: Any, settings: PluginSettings) -> None:
        self.controller = Controller(self._deploy, settings)
        attach(app, self.controller, operations=True, under=PREFIX)
        app.include_router(_engine_router(self.controller, self._running.result))
        if settings.responses != "off":
            self._responses = Responses(settings)
            app.include_router(responses_router(self.controller, self._responses))
            app.add_middleware(ReceiptMiddleware, responses=self._responses)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Prepare the engine for nonces.

        Raises:
            BackendUnavailable: This vLLM was not tested, or lacks a name that is used. This aborts the start.
            UsageError: The settings of the engine do not allow nonces.
        """
        assert self._settings is not None
        version = check_installed()
        config = engine_client.vllm_config
        check_config(config)
        check_responses(config, self._settings.responses, version)
        count = self._share(engine_client.output_processor.get_num_unfinished_requests)
        if not self._place.owns:
            return
        throttle = Throttle(self._settings.throttle, count, capacity(config, self._settings.seq_len))
        client = Client(engine_client, throttle, config.parallel_config.data_parallel_size)
        await client.install()
        names = getattr(args, "served_model_name", None) or [args.model]
        reference = self._settings.reference or (names if isinstance(names, str) else names[0])
        running = _Running(client, asyncio.get_running_loop(), version, most_positions(config), args.model, reference)
        if self._responses is not None:
            assert self.controller is not None
            await self._responses.start(
                client,
                engine_client,
                model=args.model,
                reference=reference,
                version=version,
                receipts=self.controller.receipts,
            )
        self._end_before(engine_client, running)
        self._running.set_result(running)

    def _end_before(self, engine_client: Any, running: _Running) -> None:
        """Give up the nonces that run before vLLM ends its engine.

        On SIGTERM vLLM's ``serve_http`` first calls ``AsyncLLM.shutdown`` in a thread, and only when that is done the
        shutdown of the application, which closes the controller. Requests that run then are never answered, and to
        the controller an engine that refuses new ones has failed: it would end its round for good.
        """
        end, loop_thread = engine_client.shutdown, threading.get_ident()

        def shutdown(*args: Any, **kwargs: Any) -> Any:
            assert self.controller is not None
            self.controller.closing.set()
            if threading.get_ident() != loop_thread and not running.client.ended.done():
                ending = asyncio.run_coroutine_threadsafe(running.client.end(), running.loop)
                try:
                    ending.result(PATIENCE)
                except TimeoutError:
                    ending.cancel()
            return end(*args, **kwargs)

        engine_client.shutdown = shutdown

    def _share(self, unfinished: Callable[[], int]) -> Callable[[], int]:
        """Tell other API servers what concerns them; return the number of unfinished requests in all of them."""
        shared = self._shared
        if shared is None:
            return unfinished
        loops: tuple[Callable[[], Awaitable[None]], ...] = (
            partial(shared.keep, lambda: shared.close(self._closed())),
            partial(serve_owner, self._app, prefix=PREFIXES, path=shared.path),
        )
        if not self._place.owns:
            loops = (partial(shared.keep, lambda: shared.show(unfinished())),)
        self._beside.extend(asyncio.create_task(kept_running(loop)) for loop in loops)
        return lambda: unfinished() + shared.elsewhere

    def _closed(self) -> bool:
        """Return whether a round has the engine to itself: not while it waits for the disk or for receivers."""
        if self._shared is not None and not self._place.owns:
            return self._shared.closed
        if not self._running.done() or self.controller is None or self.controller.paused is not None:
            return False
        exclusive = self._running.result().client.throttle.settings.mode == "exclusive"
        return exclusive and str(self.controller.state) == "GENERATING"

    def _deploy(self) -> Deployment:
        """Describe the engine to the service; called in the service's own thread, which waits for it."""
        assert self._settings is not None
        running = self._running.result()
        dtype = running.client.description["dtype"]
        model = identify(running.model, dtype=dtype)

        def engine(seq_len: int, batch_size: int) -> RequestEngine:
            return RequestEngine(
                running.client,
                running.loop,
                version=running.version,
                batch_size=batch_size,
                seq_len=seq_len,
                most_positions=running.positions,
            )

        return Deployment(
            reference=running.reference,
            digest=model.digest,
            weights=model.weights,
            dtype=with_cache(model.quantised or dtype, running.client.description["cache"]),
            max_positions=running.positions,
            decodes=bool(running.client.description["decodes"]),
            engine=engine,
        )


class ChatBarrier:
    """Answers new work for the engine with 503 and ``Retry-After`` while ``closed()``; running requests go on.

    The service's own routes, under ``prefix``, stay open. Paths are compared as the router does, which takes them with
    the root path (``--root-path``) and without it.
    """

    def __init__(self, app: ASGIApp, *, prefix: str | tuple[str, ...], closed: Callable[[], bool]) -> None:
        self._app, self._prefix, self._closed = app, prefix, closed

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 503."""
        works = scope["type"] == "http" and scope["method"] == "POST" and route_path(scope) not in WITHOUT_ENGINE
        if not works or route_path(scope).startswith(self._prefix) or not self._closed():
            await self._app(scope, receive, send)
            return
        await JSONResponse(BODY, status_code=503, headers={"retry-after": "10"})(scope, receive, send)


class Changes(BaseModel):
    """Settings of the throttle; those that are left out stay."""

    model_config = ConfigDict(extra="forbid", strict=True)

    mode: str | None = None
    share: float | None = None
    chat_in_flight: int | None = None
    path: str | None = None


def _engine_router(controller: Controller, running: Callable[[], _Running]) -> APIRouter:
    """Return ``/api/v1/pow/engine``: what nonces take of the vLLM engine now, and what they may take.

    Reading takes a key that may read, changing one that may do everything.
    """
    router = APIRouter(
        prefix=PREFIX,
        tags=["vLLM"],
        route_class=route_class(Keys(controller.settings), controller.settings, controller.metrics),
    )

    @router.get("/engine", openapi_extra=needs(Scope.READ))
    async def now() -> JSONResponse:
        """Nonces and chat in the vLLM engine, the settings of the throttle, and what the workers hold."""
        engine = running().client  # there is one: routes are served after init_state
        throttle = engine.throttle
        throttle.look()
        return JSONResponse(
            {
                "vllm": running().version,
                "worker": engine.description,
                "mode": throttle.settings.mode,
                "share": throttle.settings.share,
                "chat_in_flight": throttle.settings.chat_in_flight,
                "path": throttle.settings.path,
                "direct": engine.direct.describe(),
                "nonces": throttle.in_flight + engine.direct.in_flight,
                "nonces_limit": throttle.limit,
                "chat": throttle.chat,
                "workers": await engine.counts(),
            }
        )

    @router.post("/engine", openapi_extra=needs(Scope.CONTROL))
    async def change(body: Changes) -> JSONResponse:
        """Change mode, share, chat_in_flight or path until the server ends."""
        throttle = running().client.throttle
        throttle.settings = replace(throttle.settings, **body.model_dump(exclude_none=True))
        return await now()

    return router


def plugin() -> AssayPlugin:
    """Return the plugin; the entry point. It must not raise: vLLM would start without Proof of Compute."""
    return AssayPlugin()
