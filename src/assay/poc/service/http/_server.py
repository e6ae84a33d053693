"""The server process: uvicorn, signals, and an orderly end."""

import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from assay.errors import UsageError
from assay.poc.service._settings import Limits, Settings
from assay.poc.service.http._app import create_app
from assay.poc.service.http._auth import is_loopback
from assay.poc.service.http._connections import bounded
from assay.poc.service.runtime import Controller, Deployment

log = structlog.get_logger("assay.server")

MAX_FILES = 16_384


class _Server(uvicorn.Server):
    """Ends with exit code 0 on SIGTERM and SIGINT, and says so before connections are closed."""

    def __init__(self, config: uvicorn.Config, closing: Callable[[], None]) -> None:
        super().__init__(config)
        self._closing = closing

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        wanted = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self.handle_exit) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._closing()
        super().handle_exit(sig, frame)


def run_app(
    app: FastAPI,
    *,
    host: str,
    port: int,
    closing: Callable[[], None] = lambda: None,
    started: Callable[[Callable[[], None]], None] = lambda stop: None,
    limits: Limits = Limits(),  # noqa: B008  # immutable
) -> None:
    """Run an application until SIGTERM or SIGINT.

    Args:
        app: Application to run.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one, which the log names.
        closing: Is called when the end begins, while connections are still open.
        started: Receives, before the start, a function that ends the server.
        limits: Bounds on connections and on the heads of requests.

    Raises:
        UsageError: The server did not start; the log says why.
    """
    try:
        listener = _listen(host, port)
    except OSError as error:
        raise UsageError(
            f"{host}:{port}: {error.strerror}", wanted="a free port of this machine", do="pass another --port"
        ) from None
    config = uvicorn.Config(
        app,
        http=bounded(limits),
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
        server_header=False,
        lifespan="on",
    )
    server = _Server(config, closing)
    started(lambda: server.handle_exit(signal.SIGTERM, None))
    bound = listener.getsockname()[1]
    log.info("serving", url=f"http://{f'[{host}]' if ':' in host else host}:{bound}", host=host, port=bound)
    with listener:
        server.run(sockets=[listener])
    if not server.started:
        raise UsageError(f"the service on {host}:{port} did not start", wanted="a start", do="see the log above")
    log.info("stopped")


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
    if not is_loopback(host) and not settings.has_keys:
        raise UsageError(
            f"--host {host} without a key",
            wanted="an API key where others reach the port",
            do="pass --api-key-file, set ASSAY_API_KEY, or leave --host out",
        )
    controller = Controller(load, settings)

    def end_on_failure(stop: Callable[[], None]) -> None:
        controller.loaded.add_done_callback(lambda loaded: stop() if loaded.exception() else None)

    app = create_app(controller)
    run_app(app, host=host, port=port, closing=controller.closing.set, started=end_on_failure, limits=settings.limits)
    if controller.loaded.done():
        controller.loaded.result()
    sys.stderr.flush()
    if not controller.ended:
        # A batch is still inside a kernel. It is not on disk and will be computed again.
        os._exit(0)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio turns Nagle's algorithm off; without it, every answer waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    _allow_connections()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), port))
    except BaseException:
        listener.close()
        raise
    return listener


def _allow_connections() -> None:
    """Raise the soft limit on open files, which shells set to 1024: a thousand readers would use it up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
