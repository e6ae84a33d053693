"""The service inside a vLLM server: an entry point of ``vllm.endpoint_plugins``.

vLLM calls :meth:`AssayPlugin.attach_router` when the engine runs, then
:meth:`AssayPlugin.init_state`, and then starts the application, with it the controller and
everything durable. ``--api-key`` of vLLM does not guard ``/api/v1/pow``: the service has keys of
its own.
"""

import asyncio
import threading
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from assay.errors import AssayError
from assay.files.names import normal_form
from assay.models.chat import chat_template_digest
from assay.models.load import identify, load_tokenizer
from assay.poc.net.deployment import Deployment
from assay.poc.net.logs import configure_logs
from assay.poc.protocol.pins import with_cache
from assay.poc.service.service_api import PREFIX, attach, dashboard_router
from assay.poc.service.service_controller import Controller
from assay.poc.vllm.chat_barrier import ChatBarrier
from assay.poc.vllm.client import Client, connect
from assay.poc.vllm.compatibility import check_config, check_installed, check_responses
from assay.poc.vllm.engine_routes import engine_router, versions_router
from assay.poc.vllm.preflight import PluginSettings, check_arguments
from assay.poc.vllm.recorded_answers import ReceiptMiddleware, Responses
from assay.poc.vllm.vllm_engine import RequestEngine

# Seconds in which the nonces that run are given up before vLLM ends its engine.
PATIENCE = 5.0


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
        app.include_router(engine_router(self.controller, self._running.result, self._responses))
        app.include_router(versions_router(self.controller, self._running.result))
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


def plugin() -> AssayPlugin:
    """Return the plugin. It must not raise: vLLM would start without Proof of Compute."""
    return AssayPlugin()
