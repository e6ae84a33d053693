"""The service inside a vLLM server: an entry point of ``vllm.endpoint_plugins``.

vLLM calls :meth:`AssayPlugin.attach_router` when the engine runs, then
:meth:`AssayPlugin.init_state`, and then starts the application, with it the controller and
everything durable. ``--api-key`` of vLLM does not guard ``/api/v1/pow``: the service has keys of
its own.

Where answers leave receipts, clients stay as they are. A request may name itself by
``X-Request-Id`` and bring a seed, in the field ``seed`` of its body or in ``X-Assay-User-Seed``;
the answer's ``X-Assay-Receipt`` has the id of its receipt, and ``X-Assay-Block`` the block. Until
the node's chain follower has posted a block, answers are neither seeded nor recorded and say so.
"""

import asyncio
import secrets
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Literal
from urllib.parse import quote

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as Connection

from assay._version import __version__
from assay.errors import AssayError
from assay.files.names import normal_form
from assay.models.chat import chat_template_digest
from assay.models.load import identify, load_tokenizer
from assay.poc.net.deployment import Deployment
from assay.poc.net.logs import configure_logs
from assay.poc.net.refusals import refusal_of
from assay.poc.net.routes import Keys, Scope, answer, route_class, route_path
from assay.poc.net.shares import client_of
from assay.poc.protocol.checks import check_name
from assay.poc.protocol.pins import with_cache
from assay.poc.responses.receipts import ReceiptHeader
from assay.poc.service.chain_api import CHAIN_PREFIX
from assay.poc.service.receipt_keeper import ReceiptKeeper, ReceiptSink
from assay.poc.service.service_api import PREFIX, PREFIXES, attach, dashboard_router
from assay.poc.service.service_controller import Controller
from assay.poc.vllm.client import Client, call_workers, connect
from assay.poc.vllm.compatibility import check_config, check_installed, check_responses
from assay.poc.vllm.preflight import PluginSettings, check_arguments
from assay.poc.vllm.recorder import ACCEPTED, AcceptedRequest, Recorder
from assay.poc.vllm.throttle import OperatorsThrottle
from assay.poc.vllm.vllm_engine import RequestEngine

WITHOUT_ENGINE = "/tokenize", "/detokenize"  # POST routes that need no engine

RECEIPT = b"x-assay-receipt"
BLOCK = b"x-assay-block"
REQUEST_ID = b"x-request-id"
USER_SEED = b"x-assay-user-seed"
NO_RECEIPT = [(RECEIPT, b"none")]
# Seconds in which the nonces that run are given up before vLLM ends its engine.
PATIENCE = 5.0
MESSAGE = "Proof of Compute has this engine to itself for a while"
BODY = {"error": {"message": MESSAGE, "type": "service_unavailable", "param": None, "code": 503}}


class Responses:
    """What is done for the answers of one server. It belongs to the event loop of the
    application.
    """

    def __init__(self, settings: PluginSettings) -> None:
        self.settings = settings
        # Hash of the block that was posted last.
        self.newest: str | None = None
        self.recorder: Recorder | None = None
        self.sink: ReceiptSink | None = None
        self.chat_template: str | None = (
            None  # SHA-256 of the one that the server renders with, if it is known
        )
        self._posted = asyncio.Event()

    def post(self, block_hash: str) -> None:
        """Take a block. The same one again is no news."""
        if block_hash != self.newest:
            self.newest = block_hash
            posted = self._posted
            self._posted = asyncio.Event()
            posted.set()

    async def next_block(self, seconds: float) -> str | None:
        """Wait for a block that is posted from now on; return None if no block comes in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._posted.wait()
                return self.newest
        return None

    async def start(
        self, client: Client, llm: Any, model: str, reference: str, receipts: ReceiptKeeper
    ) -> None:
        """Begin to record answers of a checkpoint under the name ``reference``.

        Raises:
            ModelError: The checkpoint cannot be read.
        """
        await call_workers(llm, "assay_sketch")
        config = llm.vllm_config
        checkpoint = await asyncio.to_thread(identify, model, dtype=client.description["dtype"])
        header = ReceiptHeader(
            public_key=self.settings.responses_public_key,
            reference=reference,
            digest=checkpoint.digest,
            weights=checkpoint.weights,
            fingerprint=client.fingerprint(
                config.scheduler_config.max_num_seqs, config.model_config.max_model_len
            ),
        )
        self.sink = receipts.sink(header)
        self.recorder = Recorder(
            llm,
            self.sink,
            public_key=header.public_key,
            digest=header.digest,
            seeded=self.settings.responses == "seeded",
        )

    async def accept(
        self, headers: dict[bytes, bytes], path: str, client: str | None
    ) -> AcceptedRequest | None:
        """Fix the seed of a request's answer; None where it is not recorded."""
        if self.sink is None:
            return None
        named = headers.get(REQUEST_ID)
        seed = headers.get(USER_SEED)
        request_id = named.decode("latin-1") if named is not None else secrets.token_hex(16)
        check_name("X-Request-Id", request_id, do="send such an id, or none")
        user_seed = None if seed is None else seed.decode("latin-1")
        if user_seed is not None:
            check_name("X-Assay-User-Seed", user_seed, do="send such a seed, or none", fewest=0)
        self.sink.check(client)
        later = self.settings.responses_block == "next"
        block = await self.next_block(self.settings.responses_wait) if later else self.newest
        chosen_by: Literal["client", "server"] = "server" if named is None else "client"
        template = self.chat_template if path.endswith("/chat/completions") else None
        return (
            None
            if block is None
            else AcceptedRequest(request_id, block, user_seed, chosen_by, template, client)
        )

    def describe(self) -> dict[str, Any]:
        """Return the settings, the block that is known, and how many receipts there were."""
        return {
            "mode": self.settings.responses,
            "public_key": self.settings.responses_public_key,
            "block": self.settings.responses_block,
            "block_hash": self.newest,
            "receipts": {} if self.recorder is None else self.recorder.counts,
        }


def _asks_engine(scope: Connection) -> bool:
    """Return whether a request is work for the engine.

    Paths are compared as the router does, which takes them with the root path (``--root-path``) and
    without it.
    """
    posts = scope["type"] == "http" and scope["method"] == "POST"
    return (
        posts
        and route_path(scope) not in WITHOUT_ENGINE
        and not route_path(scope).startswith(PREFIXES)
    )


class ReceiptMiddleware:
    """Seeds requests to the engine, and names the receipt in the answer's headers.

    An answer whose receipt cannot be stored does not reach its end: it is replaced by the refusal
    where nothing was sent, and else cut off.
    """

    def __init__(self, app: ASGIApp, *, responses: Responses) -> None:
        self._app = app
        self._responses = responses

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if not _asks_engine(scope):
            await self._app(scope, receive, send)
            return
        try:
            client = client_of(scope["client"][0]) if scope.get("client") else None
            accepted = await self._responses.accept(
                dict(scope["headers"]), route_path(scope), client
            )
        except AssayError as error:
            await answer(refusal_of(error))(scope, receive, send)
            return
        if accepted is None:
            await self._app(scope, receive, partial(_send_unrecorded, send))
            return
        # VLLM makes the id of its answer from it.
        if accepted.chosen_by == "server":
            scope = dict(scope) | {
                "headers": [*scope["headers"], (REQUEST_ID, accepted.request_id.encode())]
            }
        token = ACCEPTED.set(accepted)
        guarded = _Guarded(scope, receive, send, accepted)
        try:
            await self._app(scope, receive, guarded)
        except _CutOff:
            pass
        except Exception:
            if accepted.refused is None:
                raise
            await guarded.refuse()
        finally:
            ACCEPTED.reset(token)


class _CutOff(Exception):
    """An answer that must not reach its end."""


class _Guarded:
    """The ``send`` of an answer that is recorded."""

    def __init__(
        self, scope: Connection, receive: Receive, send: Send, accepted: AcceptedRequest
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._accepted = accepted
        self._plain = send
        self._started = self._refused = False

    def __call__(self, message: Message) -> Awaitable[None]:
        """Send a message of the answer, or the refusal in place of all of them."""
        if self._accepted.refused is not None:
            return self.refuse()
        if not self._started:
            self._started = True
            # A stream begins before its request is known to be recorded.
            streams = any(
                name == b"content-type" and b"event-stream" in value
                for name, value in message["headers"]
            )
            named = {RECEIPT: self._accepted.request_id, BLOCK: self._accepted.block_hash}
            headers = [(name, quote(text).encode()) for name, text in named.items()]
            message = _with(message, headers if streams or self._accepted.stored else NO_RECEIPT)
        # Not awaited here: a stream has a message for every token.
        return self._plain(message)

    async def refuse(self) -> None:
        """Send the refusal; cut an answer off that has begun."""
        if self._started:
            raise _CutOff
        if self._accepted.refused is not None and not self._refused:
            self._refused = True
            await answer(refusal_of(self._accepted.refused))(
                self._scope, self._receive, self._plain
            )


async def _send_unrecorded(send: Send, message: Message) -> None:
    await send(_with(message, NO_RECEIPT) if message["type"] == "http.response.start" else message)


def _with(message: Message, headers: list[tuple[bytes, bytes]]) -> Message:
    return dict(message) | {"headers": [*message.get("headers", ()), *headers]}


def _served_template(config: Any, args: Any) -> str | None:
    """Return the SHA-256 of the tokenizer's chat template; None where the server or its clients may
    set another one.
    """
    if getattr(args, "chat_template", None) or getattr(args, "trust_request_chat_template", False):
        return None
    # VLLM reads tokenizers that are not read here.
    with suppress(AssayError):
        return chat_template_digest(load_tokenizer(config.model_config.tokenizer)) or None
    return None


class AssayPlugin:
    """Mounts the service, and gives it an engine that runs nonces as requests."""

    name = "assay"
    required_tasks = ("generate",)

    controller: Controller
    _settings: PluginSettings

    def __init__(self) -> None:
        self._running: Future[Client] = Future()
        self._model = self._reference = ""
        self._served_names: tuple[str, ...] = ()
        self._responses: Responses | None = None

    def attach_router(self, app: Any) -> None:
        """Mount routes, page and callbacks.

        Raises:
            UsageError: A setting is out of range, or the port needs a key. This aborts the start of
                the server.
            StorageError: The data directory is in use or cannot be written.
        """
        configure_logs("console")
        settings = PluginSettings()
        check_arguments(app.state.args, settings)
        settings = self._settings = settings.for_port(getattr(app.state.args, "port", None))
        self.controller = Controller(self._deploy, settings)
        attach(app, self.controller, operations=True, under=PREFIX)
        if settings.responses != "off":
            self._responses = Responses(settings)
            app.add_middleware(ReceiptMiddleware, responses=self._responses)
        app.include_router(_router(self.controller, self._running.result, self._responses))
        app.include_router(_versions_router(self.controller, self._running.result))
        app.include_router(dashboard_router())
        app.add_middleware(ChatBarrier, closed=self._closed)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Prepare the engine for nonces.

        Raises:
            BackendUnavailable: This vLLM was not tested. This aborts the start.
            UsageError: The settings of the engine do not allow nonces.
        """
        version = check_installed()
        settings = self._settings
        config = engine_client.vllm_config
        check_config(config)
        check_responses(config, settings.responses)
        client = await connect(engine_client, settings.throttle, settings.seq_len, version=version)
        names = getattr(args, "served_model_name", None) or [args.model]
        self._model = args.model
        self._served_names = (names,) if isinstance(names, str) else tuple(names)
        self._reference = normal_form(settings.reference or self._served_names[0])
        if self._responses is not None:
            self._responses.chat_template = await asyncio.to_thread(_served_template, config, args)
            await self._responses.start(
                client, engine_client, self._model, self._reference, self.controller.receipts
            )
        self._end_before(engine_client, client)
        self._running.set_result(client)

    def _end_before(self, engine_client: Any, client: Client) -> None:
        """Give up the nonces that run before vLLM ends its engine.

        On SIGTERM vLLM's ``serve_http`` first calls ``AsyncLLM.shutdown`` in a thread, and only
        when that is done the shutdown of the application, which closes the controller. Requests
        that run then are never answered, and to the controller an engine that refuses new ones has
        failed: it would end its round for good.
        """
        end = engine_client.shutdown
        loop_thread = threading.get_ident()

        def shutdown(*args: Any, **kwargs: Any) -> Any:
            self.controller.closing.set()
            if threading.get_ident() != loop_thread and not client.ended.done():
                ending = asyncio.run_coroutine_threadsafe(client.end(), client.loop)
                try:
                    ending.result(PATIENCE)
                except TimeoutError:
                    ending.cancel()
            return end(*args, **kwargs)

        engine_client.shutdown = shutdown

    def _closed(self) -> bool:
        """Return whether a round has the engine to itself: not while it waits for the disk or for
        receivers.
        """
        if not self._running.done() or self.controller.paused is not None:
            return False
        exclusive = self._running.result().throttle.settings.mode == "exclusive"
        return exclusive and str(self.controller.state) == "GENERATING"

    def _deploy(self) -> Deployment:
        """Describe the engine to the service; called in the service's own thread, which waits for
        it.
        """
        client = self._running.result()
        dtype = client.description["dtype"]
        model = identify(self._model, dtype=dtype)
        pins = self._settings.pins
        model = model.with_frame(None if pins is None else pins.frame(model.digest))
        return Deployment(
            reference=self._reference,
            aliases=(*self._served_names, self._model),
            digest=model.digest,
            weights=model.weights,
            dtype=with_cache(model.quantised or dtype, client.description["cache"]),
            max_positions=client.positions,
            decodes=bool(client.description["decodes"]),
            framed=model.frame is not None,
            engine=lambda seq_len, batch_size: RequestEngine(
                client, batch_size=batch_size, seq_len=seq_len, frame=model.frame
            ),
        )


class ChatBarrier:
    """Answers new chat with 503 and ``Retry-After`` while ``closed()``; running chat goes on."""

    def __init__(self, app: ASGIApp, *, closed: Callable[[], bool]) -> None:
        self._app = app
        self._closed = closed

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 503."""
        if not _asks_engine(scope) or not self._closed():
            await self._app(scope, receive, send)
            return
        await JSONResponse(BODY, status_code=503, headers={"retry-after": "10"})(
            scope, receive, send
        )


class NewBlock(BaseModel, extra="forbid", strict=True):
    """A block that the chain has."""

    block_hash: str


class Changes(BaseModel, extra="forbid", strict=True):
    """Settings of the throttle; those that are left out stay."""

    mode: str | None = None
    share: float | None = None
    chat_in_flight: int | None = None
    path: str | None = None


def _router(
    controller: Controller, running: Callable[[], Client], responses: Responses | None
) -> APIRouter:
    """Return the routes of vLLM: what nonces take and may take of the engine, and what is done for
    answers.

    Reading takes a key that may read, changing and posting a block one that may do everything.
    """
    guarded = route_class(Keys(controller.settings), controller.settings, controller.metrics)
    router = APIRouter(prefix=PREFIX, tags=["vLLM"], route_class=guarded)

    @router.get("/engine", openapi_extra=Scope.READ.extra)
    async def now() -> JSONResponse:
        """Nonces and chat in the vLLM engine, the settings of the throttle, and what the workers
        hold.
        """
        # There is one: routes are served after init_state.
        engine = running()
        throttle = engine.throttle
        throttle.look()
        return JSONResponse(
            {
                "vllm": engine.version,
                "worker": engine.description,
                **throttle.settings.model_dump(include=set(Changes.model_fields)),
                "forward": "vllm",  # before 0.3 there was another one
                "direct": engine.direct.describe(),
                "nonces": throttle.in_flight + engine.direct.in_flight,
                "nonces_limit": throttle.limit,
                "chat": throttle.chat,
                "workers": await engine.counts(),
            }
        )

    @router.post("/engine", openapi_extra=Scope.CONTROL.extra)
    async def change(body: Changes) -> JSONResponse:
        """Change mode, share, chat_in_flight or path until the server ends."""
        throttle = running().throttle
        changed = throttle.settings.model_dump() | body.model_dump(exclude_none=True)
        throttle.settings = OperatorsThrottle(**changed)
        return await now()

    if responses is None:
        return router

    @router.get("/responses", openapi_extra=Scope.READ.extra)
    async def recorded() -> JSONResponse:
        """Whether answers are seeded and recorded, by which block, and how many were."""
        return JSONResponse(responses.describe())

    @router.post("/responses/block", openapi_extra=Scope.CONTROL.extra)
    async def post(body: NewBlock) -> JSONResponse:
        """Take the newest block of the chain: the answers to later requests follow from it."""
        check_name("block_hash", body.block_hash, do="pass the block hash as the chain prints it")
        responses.post(body.block_hash)
        return JSONResponse(responses.describe())

    return router


def _versions_router(controller: Controller, running: Callable[[], Client]) -> APIRouter:
    """Return the route that tells the client of the chain what this build can do."""
    guarded = route_class(Keys(controller.settings), controller.settings, controller.metrics)
    router = APIRouter(tags=["Gonka"], route_class=guarded)

    async def versions() -> JSONResponse:
        """Version of vLLM, and whether chat goes on while artifacts are checked."""
        about = {"vllm_version": running().version, "poc_validation_inference": True}
        return JSONResponse(about | {"assay_version": __version__})

    for prefix in (CHAIN_PREFIX, PREFIX):
        router.get(f"{prefix}/versions", openapi_extra=Scope.READ.extra)(versions)
    return router


def plugin() -> AssayPlugin:
    """Return the plugin. It must not raise: vLLM would start without Proof of Compute."""
    return AssayPlugin()
