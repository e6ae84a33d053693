"""The server process: uvicorn with bounds, signals, and an orderly end."""

import asyncio
import errno
import gc
import math
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FrameType
from typing import Any

import h11
import structlog
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from typing_extensions import override
from uvicorn.protocols.http.h11_impl import H11Protocol

from assay.errors import UsageError
from assay.poc.net.answers import answer
from assay.poc.net.refusals import Refusal
from assay.poc.net.runtime import Runtime
from assay.poc.net.server_settings import ListenerSettings
from assay.poc.net.shares import Shares, client_of

log = structlog.get_logger("assay.server")

MAX_FILES = 16_384
MAX_HEADERS = 256  # lines of a head, and of the trailers of a body
MAX_CHUNKS = 1024.0
# Connections that wait to be accepted, as uvicorn has it.
BACKLOG = 2048
# Mean bytes of the chunks of a body, below which it is refused.
LEAST_CHUNK = 128

_CONTRADICTION = Refusal(
    400,
    "headers that contradict each other",
    wanted="one authorization, and one of content-length and transfer-encoding",
    do="send one of the two",
)


class ClientLimit:
    """Limits the open requests of one client, event streams among them: 429 beyond the limit.

    It answers 400 to a head that another server on the way may read otherwise: one with two
    lengths of a body, or with two keys.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._open = Shares(sys.maxsize, most)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        client = client_of(scope["client"][0]) if scope.get("client") else None
        app = self._app
        names = [name for name, _ in scope.get("headers", ())]
        is_ambiguous = names.count(b"authorization") > 1 or (
            b"content-length" in names and b"transfer-encoding" in names
        )
        if is_ambiguous:
            app = answer(_CONTRADICTION)
            # What follows may be a part of the body.
            app.headers["connection"] = "close"
        with ExitStack() as open_request:
            try:
                open_request.enter_context(
                    self._open.held(client, "requests", do="wait for some of yours")
                )
            except Refusal as refusal:
                app = answer(refusal)
            await app(scope, receive, send)


class _Connection(h11.Connection):
    """HTTP/1.1 with few headers, and without bodies in tiny chunks: h11 parses each by itself."""

    def __init__(self, most: int) -> None:
        super().__init__(h11.SERVER, most)
        self._spare = 0.0

    @override
    def next_event(self) -> Any:
        event = super().next_event()
        # Trailers come with the end of a message.
        if isinstance(event, h11.Request | h11.EndOfMessage) and len(event.headers) > MAX_HEADERS:
            raise h11.RemoteProtocolError("too many headers", error_status_hint=431)
        if isinstance(event, h11.Request):
            self._spare = MAX_CHUNKS
        elif isinstance(event, h11.Data):
            self._spare += len(event.data) / LEAST_CHUNK - event.chunk_end
            if self._spare < 0:
                raise h11.RemoteProtocolError("a body of many small chunks")
        return event


class BoundedProtocol(H11Protocol):
    """A connection with a deadline for request heads and a share for each client.

    It also ends where many requests are sent before the first is answered: what waits would have no
    bound.
    """

    def __init__(self, config: uvicorn.Config, *, connections: Shares, **about: Any) -> None:
        super().__init__(config, **about)
        self.conn = _Connection(config.h11_max_incomplete_event_size)  # type: ignore[arg-type]
        self._shares = connections
        self._ahead = 0

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._client = client_of(self.client[0]) if self.client else None
        fits = self._shares.fits(self._client)
        self._shares.take(self._client)
        if not fits:
            transport.abort()
            return
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._shares.give(self._client)
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
        super().connection_lost(exc)

    @override
    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.DONE:
            self._ahead += len(data)
            if self._ahead > self.config.h11_max_incomplete_event_size:  # type: ignore[operator]
                self.transport.abort()
                return
        # A part of a head must not end the wait for the whole of it, as it does in uvicorn.
        timer = self.timeout_keep_alive_task
        self.timeout_keep_alive_task = None
        before = self.cycle
        super().data_received(data)
        if self.cycle is before:
            self.timeout_keep_alive_task = timer
        elif timer is not None:
            timer.cancel()

    @override
    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # the answer began before the rest of the body came
            self.transport.close()

    @override
    def on_response_complete(self) -> None:
        self._ahead = 0
        super().on_response_complete()


class _Server(uvicorn.Server):
    """Ends with exit code 0 on SIGTERM and SIGINT, and says so before connections are closed."""

    def __init__(self, config: uvicorn.Config, closing: threading.Event) -> None:
        super().__init__(config)
        self._closing = closing

    @override
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own raises the signal again at the end, and the exit code would say so.
        self._closing.set()
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


def bounded_config(app: ASGIApp, settings: ListenerSettings) -> uvicorn.Config:
    """Return how uvicorn serves an application under the bounds of some settings."""
    connections = Shares(sys.maxsize, settings.max_client_connections)  # uvicorn bounds them in all
    return uvicorn.Config(
        ClientLimit(app, settings.max_client_connections),
        http=partial(BoundedProtocol, connections=connections),  # type: ignore[arg-type]
        h11_max_incomplete_event_size=settings.max_header,
        limit_concurrency=settings.max_connections + 1,  # the connection that is refused is counted
        timeout_keep_alive=math.ceil(settings.header_timeout),
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
        server_header=False,
        lifespan="on",
    )


def run_app(
    app: ASGIApp,
    settings: ListenerSettings,
    listener: socket.socket,
    *,
    runtime: Runtime | None = None,
) -> None:
    """Run an application on a bound socket until SIGTERM or SIGINT, with given limits.

    A ``runtime`` is told when the end begins, while connections are still open; it ends the server
    where its model cannot be loaded or its engine keeps failing. Where a thread of it still
    computes at the end, the process ends without returning: the libraries below such a thread abort
    when Python takes them down.

    Raises:
        UsageError: The server did not start; the log says why. Or metrics would be shared with
            other processes.
        ModelError: The model could not be loaded, or its engine keeps failing.
    """
    # Its files outlive a restart, and would mix the counters of two servers.
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        raise UsageError(
            "PROMETHEUS_MULTIPROC_DIR in the environment",
            wanted="metrics of this process alone",
            do="start assay without it",
        )
    server = _Server(
        bounded_config(app, settings), runtime.closing if runtime else threading.Event()
    )

    def on_loaded(loaded: Future[Any]) -> None:
        # A collection that walks all of torch and transformers holds every request up, for a second
        # and more.
        gc.freeze()
        if loaded.exception():
            server.handle_exit(signal.SIGTERM, None)

    if runtime is not None:
        runtime.loaded.add_done_callback(on_loaded)
        runtime.failed.add_done_callback(lambda _: server.handle_exit(signal.SIGTERM, None))
    host, port = listener.getsockname()[:2]
    log.info(
        "serving", url=f"http://{f'[{host}]' if ':' in host else host}:{port}", host=host, port=port
    )
    server.run(sockets=[listener])
    if not server.started:
        raise UsageError(
            f"the service on {host}:{port} did not start", wanted="a start", do="see the log above"
        )
    log.info("stopped")
    for future in (runtime.loaded, runtime.failed) if runtime is not None else ():
        if future.done():
            future.result()
    # What it computes is not on disk, and will be computed again.
    if runtime is not None and not runtime.ended:
        sys.stderr.flush()
        os._exit(0)


@contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """Open a listening socket for :func:`run_app`.

    It comes before any file is opened, so that a port in use leaves none behind.

    Raises:
        UsageError: The address is in use, or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The soft limit on open files, which shells set to 1024, is raised: a thousand readers would
    # use it up.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    # With the protocol named, asyncio turns Nagle's algorithm off; without it, every answer waits
    # 40 ms.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host.strip("[]"), port))
            # Under SO_REUSEADDR two processes may bind one port until one of them listens.
            listener.listen(BACKLOG)
        except OSError as error:
            of_port = error.errno in (errno.EADDRINUSE, errno.EACCES)
            wanted, flag = ("a free port", "--port") if of_port else ("an address", "--host")
            raise UsageError(
                f"{host}:{port}: {error.strerror}",
                wanted=f"{wanted} of this machine",
                do=f"pass another {flag}",
            ) from None
        yield listener


def check_port(host: str, port: int) -> None:
    """Refuse, before a model is read, an address that :func:`listen` would refuse afterwards."""
    with listen(host, port):
        pass
