"""The service inside a vLLM server: an entry point of ``vllm.endpoint_plugins``.

vLLM calls :meth:`AssayPlugin.attach_router` before its engine exists, :meth:`AssayPlugin.init_state` when it does, and
then starts the application, with it the controller and everything durable. ``--api-key`` of vLLM does not guard
``/api/v1/pow``: the service has keys of its own.
"""

import asyncio
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from assay.errors import UsageError
from assay.models import identify
from assay.poc.engines.vllm import (
    Client,
    Flow,
    RequestEngine,
    capacity,
    check_alone,
    check_config,
    check_installed,
    most_positions,
)
from assay.poc.serving._engine_route import engine_router
from assay.poc.serving._middleware import Barrier, Under
from assay.poc.serving._settings import PluginSettings

if TYPE_CHECKING:
    from assay.poc.service.runtime import Controller, Deployment

__all__ = ["AssayPlugin", "plugin"]


@dataclass(frozen=True)
class _Running:
    """An engine that is up."""

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
        self.controller: Controller | None = None

    def attach_router(self, app: Any) -> None:
        """Mount routes, page and callbacks. What is wrong with the settings ends the start of the server.

        Raises:
            UsageError: a setting is out of range, others reach the port and there is no key, or there are several
                servers or engines.
            StorageError: the data directory is in use or cannot be written.
        """
        from assay.poc.service import configure_logs
        from assay.poc.service.dashboard import dashboard_router
        from assay.poc.service.http import PREFIX, LocalOnly, attach
        from assay.poc.service.runtime import Controller

        configure_logs("console")
        check_alone(app.state.args)
        settings = self._settings = PluginSettings.of()
        _check_host(app.state.args, settings.service.has_keys)
        self.controller = Controller(self._deploy, settings.service)
        attach(app, self.controller, operations=True, under=PREFIX)
        app.include_router(engine_router(self.controller, self._client))
        app.include_router(dashboard_router())
        app.add_middleware(Barrier, prefix=PREFIX, closed=self._closed)
        if not settings.service.has_keys:
            app.add_middleware(Under, prefix=PREFIX, middleware=LocalOnly)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Prepare the engine for nonces. What stands against it ends the start of the server.

        Raises:
            BackendUnavailable: this vLLM was not tested, or lacks something that is used.
            UsageError: its settings do not allow nonces.
        """
        assert self._settings is not None
        version = check_installed()
        config = engine_client.vllm_config
        check_config(config)
        count = engine_client.output_processor.get_num_unfinished_requests
        client = Client(engine_client, Flow(self._settings.flow, count, capacity(config)))
        await client.install()
        names = getattr(args, "served_model_name", None) or [args.model]
        reference = self._settings.reference or (names if isinstance(names, str) else names[0])
        loop = asyncio.get_running_loop()
        self._running.set_result(_Running(client, loop, version, most_positions(config), args.model, reference))

    def _client(self) -> tuple[Client, str]:
        running = self._running.result()  # there is one: routes are served after init_state
        return running.client, running.version

    def _closed(self) -> bool:
        """Say whether a round has the engine to itself: not while it waits for the disk or for receivers."""
        if not self._running.done() or self.controller is None or self.controller.paused is not None:
            return False
        exclusive = self._running.result().client.flow.settings.mode == "exclusive"
        return exclusive and str(self.controller.state) == "GENERATING"

    def _deploy(self) -> "Deployment":
        """Describe the engine to the service; called in the service's own thread, which waits for it."""
        from assay.poc.service.runtime import Deployment

        running = self._running.result()
        model = identify(running.model, dtype=running.client.description["dtype"])
        return Deployment(
            reference=running.reference,
            digest=model.digest,
            weights=model.weights,
            dtype=running.client.description["dtype"],
            max_positions=running.positions,
            engine=partial(self._engine, running),
        )

    def _engine(self, running: _Running, seq_len: int, batch_size: int) -> RequestEngine:
        assert self._settings is not None
        return RequestEngine(
            running.client,
            running.loop,
            version=running.version,
            batch_size=batch_size,
            seq_len=seq_len,
            most_positions=running.positions,
            inputs=self._settings.inputs,
        )


def plugin() -> AssayPlugin:
    """Return the plugin; the entry point. Never fails: vLLM would go on without Proof of Compute."""
    return AssayPlugin()


def _check_host(args: Any, has_keys: bool) -> None:
    from assay.poc.service.http import is_loopback

    host = getattr(args, "host", None)
    if has_keys or getattr(args, "uds", None) or (host and is_loopback(host)):
        return
    raise UsageError(
        f"--host {host or '0.0.0.0'} without a key of assay",
        wanted="a key where others reach the port: that of --api-key does not guard /api/v1/pow",
        do="set ASSAY_API_KEY or ASSAY_API_KEY_FILE, or pass --host 127.0.0.1",
    )
