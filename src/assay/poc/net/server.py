"""The server process: uvicorn with bounds, signals, and an orderly end."""

import asyncio
import errno
import ipaddress
import os
import resource
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from http import HTTPStatus
from types import FrameType
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from assay.errors import UsageError
from assay.files.jsonl import dumps
from assay.poc.net.lifespan import Served
from assay.poc.net.refusals import Refusal
from assay.poc.net.routes import is_loopback
from assay.poc.service.app import create_app
from assay.poc.service.controller import Controller
from assay.poc.service.deployment import Deployment
from assay.poc.service.metrics import Exported
from assay.poc.service.settings import Settings

log = structlog.get_logger("assay.server")

MAX_FILES = 16_384
MAX_HEADERS = 100


class Bounded(HttpToolsProtocol):
    """uvicorn's HTTP protocol with bounds on connections and heads, which hold before any key is checked.

    uvicorn bounds neither: a client without a key could hold every connection, or send one header that never ends. Too
    many connections are answered with 503, too many of one client with 429, a head that is too large with 431, and one
    that is too slow with 408; then the connection is closed.
    """

    settings: Settings  # these three are set by the subclass that bounded() makes
    metrics: Exported | None
    open: Counter[str]  # connections by client
    _client: str | None = None
    _unparsed = 0  # bytes since the last part of a message was whole; the parser keeps them in memory
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._client = client_of(self.client[0]) if self.client else None
        if self._client is not None:
            self.open[self._client] += 1
        most, most_of_client = self.settings.max_connections, self.settings.max_client_connections
        if len(self.connections) > most:
            self._count_refused("total")
            self._refuse(503, f"{most} connections are open", "fewer", "try again later")
        elif self._client is not None and self.open[self._client] > most_of_client:
            self._count_refused("client")
            self._refuse(429, f"{most_of_client} connections of one client are open", "fewer", "close some of yours")
        else:
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._client is not None:
            self.open[self._client] -= 1
            if not self.open[self._client]:
                del self.open[self._client]  # or the addresses of all who ever came would stay in memory
            self._client = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            self._start_timer()  # the first bytes of the next head, or a body that the last answer did not wait for
        self._unparsed += len(data)
        super().data_received(data)
        if self._unparsed > self.settings.max_header and not self.transport.is_closing():
            self._refuse_head()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._unparsed = 0
        if self.transport.is_closing():
            return
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self.settings.max_header or len(self.headers) > MAX_HEADERS:
            self._refuse_head()
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed = 0
        if not self.transport.is_closing():
            super().on_message_complete()

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.settings.header_timeout, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _count_refused(self, bound: str) -> None:
        if self.metrics is not None:
            self.metrics.connections_refused.labels(bound).inc()

    def _too_slow(self) -> None:
        if not self.transport.is_closing():
            wanted = f"its head within {self.settings.header_timeout:g} s"
            self._refuse(408, "a request that does not come to its end", wanted, "send it at once")

    def _refuse_head(self) -> None:
        wanted = f"at most {self.settings.max_header} bytes and {MAX_HEADERS} headers"
        self._refuse(431, "the head of the request is too large", wanted, "send less")

    def _refuse(self, status: int, seen: str, wanted: str, do: str) -> None:
        body = dumps(Refusal(status, seen, wanted=wanted, do=do).body).encode()
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self._stop_timer()
        self.transport.write(head.encode() + body)
        self.transport.close()


def client_of(address: str) -> str | None:
    """Return by what the connections of a client are counted; None for an address of this machine.

    Behind a proxy all clients have its address. One on this machine must be able to hold all connections, and bounds
    those of its clients itself. Of IPv6 a client has a whole /64.
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:  # a socket without addresses
        return None
    if isinstance(found, ipaddress.IPv6Address):
        mapped = found.ipv4_mapped
        found = found if mapped is None else mapped
    if is_loopback(str(found)):
        return None
    return str(found) if found.version == 4 else str(ipaddress.ip_network((int(found), 64), strict=False))


def bounded(settings: Settings, metrics: Exported | None = None) -> type[asyncio.Protocol]:
    """Return the protocol with the bounds of some settings, which counts what it refuses."""
    return type("Bounded", (Bounded,), {"settings": settings, "metrics": metrics, "open": Counter[str]()})


class _Server(uvicorn.Server):
    """Ends with exit code 0 on SIGTERM and SIGINT, and says so before connections are closed."""

    def __init__(self, config: uvicorn.Config, closing: threading.Event) -> None:
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
        self._closing.set()
        super().handle_exit(sig, frame)


def run_app(
    app: FastAPI,
    settings: Settings,
    listener: socket.socket,
    *,
    controller: Served | None = None,
) -> None:
    """Run an application on a socket of :func:`listen` until SIGTERM or SIGINT, under the bounds of ``settings``.

    A ``controller`` is told when the end begins, while connections are still open; it ends the server where its model
    cannot be loaded. Where a thread of it still computes at the end, the process ends without returning: the
    libraries below such a thread abort when Python takes them down.

    Raises:
        UsageError: The server did not start; the log says why.
        ModelError: The model could not be loaded.
    """
    config = uvicorn.Config(
        app,
        http=bounded(settings, controller.metrics if controller else None),
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
        server_header=False,
        lifespan="on",
    )
    server = _Server(config, controller.closing if controller else threading.Event())

    def end_on_failure(loaded: Future[Any]) -> None:
        if loaded.exception():
            server.handle_exit(signal.SIGTERM, None)

    if controller is not None:
        controller.loaded.add_done_callback(end_on_failure)
    host, port = listener.getsockname()[:2]
    log.info("serving", url=f"http://{f'[{host}]' if ':' in host else host}:{port}", host=host, port=port)
    server.run(sockets=[listener])
    if not server.started:
        raise UsageError(f"the service on {host}:{port} did not start", wanted="a start", do="see the log above")
    log.info("stopped")
    if controller is None:
        return
    if controller.loaded.done():
        controller.loaded.result()
    if not controller.ended:  # what it computes is not on disk, and will be computed again
        sys.stderr.flush()
        os._exit(0)


def check_host(host: str, settings: Settings) -> None:
    """Refuse an address that others reach while requests need no key.

    Raises:
        UsageError: It is such an address.
    """
    if not is_loopback(host) and not settings.has_keys:
        raise UsageError(
            f"--host {host} without a key",
            wanted="an API key where others reach the port",
            do="pass --api-key-file, set ASSAY_API_KEY, or leave --host out",
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
        run_app(create_app(controller), settings, listener, controller=controller)


@contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """Hold a socket for :func:`run_app`: before any file is opened, so that a port in use leaves none behind.

    Raises:
        UsageError: The address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    _allow_connections()
    # With the protocol named, asyncio turns Nagle's algorithm off; without it, every answer waits 40 ms.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host.strip("[]"), port))
        except OSError as error:
            of_port = error.errno in (errno.EADDRINUSE, errno.EACCES)
            raise UsageError(
                f"{host}:{port}: {error.strerror}",
                wanted="a free port of this machine" if of_port else "an address of this machine",
                do="pass another --port" if of_port else "pass another --host",
            ) from None
        yield listener


def _allow_connections() -> None:
    """Raise the soft limit on open files, which shells set to 1024: a thousand readers would use it up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
