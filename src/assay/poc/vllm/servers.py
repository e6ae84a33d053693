"""Several API servers of one engine (``--api-server-count``): the first one owns the round, and the others pass on.

vLLM starts them as processes that accept connections on one port, so a client reaches now one and now another. The
first one has the database, the nonces and their throttle. The others send every request for the service to it, over a
socket in the data directory that only its owner may open. Two values concern all of them, and are shared through a
small file: how many requests are unfinished in each, because nonces give way to the chat of all, and whether a round
has the engine to itself. If one of the processes ends, vLLM ends all.
"""

import asyncio
import contextlib
import mmap
import multiprocessing
import os
import re
import socket
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from assay.files.storage import storage_error
from assay.poc.net.refusals import Refusal
from assay.poc.net.routes import answer, route_path

SOCKET = "owner.sock"
COUNTS = "servers.counts"
LONGEST_PATH = 107  # bytes that the system takes for the path of a socket
PAUSE = 0.01  # seconds between two looks at what is shared
ITEM = 8  # bytes of a shared value
_NUMBERED = re.compile(r"ApiServer_(\d+)")
_OF_ONE_CONNECTION = {b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
_CLIENT = b"x-forwarded-for"


@dataclass(frozen=True)
class Place:
    """Which API server this process is.

    Args:
        index: Its number, from 0; the first one owns the round.
        count: Number of API servers.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def of(cls, arguments: Namespace) -> "Place":
        """Return the place of this process, which vLLM names by its number."""
        numbered = _NUMBERED.fullmatch(multiprocessing.current_process().name)
        return cls(int(numbered[1]), arguments.api_server_count) if numbered else cls()

    @property
    def owns(self) -> bool:
        """Whether this process has the round."""
        return self.index == 0


class Shared:
    """What API servers know of each other: an integer for each, and one for a round that has the engine to itself.

    Args:
        folder: Data directory, which is made where it is not there.
        place: Place of this process, whose own value is set to 0.

    Raises:
        StorageError: The data directory cannot be written.
    """

    def __init__(self, folder: Path, place: Place) -> None:
        self.path, size = folder / SOCKET, ITEM * (place.count + 1)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / COUNTS, os.O_RDWR | os.O_CREAT, 0o600)
            with os.fdopen(descriptor, "r+b") as file:
                # Never made shorter: a server that has it open would end where it reads beyond.
                os.ftruncate(file.fileno(), max(size, os.fstat(file.fileno()).st_size))
                self._values = memoryview(mmap.mmap(file.fileno(), size)).cast("q")
        except OSError as error:
            raise storage_error(folder, error) from None
        self._place = place
        self.show(0)
        if place.owns:
            self.close(False)

    def show(self, unfinished: int) -> None:
        """Tell the others how many requests are unfinished here."""
        self._values[1 + self._place.index] = unfinished

    @property
    def elsewhere(self) -> int:
        """Number of requests that are unfinished in other API servers."""
        return sum(self._values[1:]) - self._values[1 + self._place.index]

    @property
    def closed(self) -> bool:
        """Whether a round has the engine to itself."""
        return bool(self._values[0])

    def close(self, closed: bool) -> None:
        """Tell the others whether a round has the engine to itself."""
        self._values[0] = closed

    async def keep(self, look: Callable[[], None]) -> None:
        """Look at what is to be shared, again and again, until cancelled."""
        while True:
            look()
            await asyncio.sleep(PAUSE)


class PassOn:
    """Sends the requests of some paths to the API server that owns the round, and its answers back.

    The owner checks keys and bounds bodies. A client that leaves ends its request there too.

    Args:
        app: Application that answers all other paths.
        prefix: Beginnings of the paths.
        path: Socket of the owner.
    """

    def __init__(self, app: ASGIApp, *, prefix: tuple[str, ...], path: Path) -> None:
        self._app, self._prefix = app, prefix
        transport = httpx.AsyncHTTPTransport(uds=str(path), limits=httpx.Limits(max_connections=None))
        # The owner ends what takes too long: a round that is waited for, and events, may be silent for minutes.
        self._client = httpx.AsyncClient(transport=transport, timeout=None)

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Pass a request on; answer 503 while the owner does not listen."""
        if scope["type"] != "http" or not route_path(scope).startswith(self._prefix):
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            found = await self._client.send(self._made(request), stream=True)
        except ClientDisconnect:
            return
        except (httpx.InvalidURL, UnicodeError):
            refusal = Refusal(
                400,
                "a path or a query that cannot be passed on",
                wanted="printable ASCII, and at most 64 KiB of it",
                do="percent-encode other characters",
            )
            await answer(refusal)(scope, receive, send)
            return
        except httpx.TransportError:
            refusal = Refusal(
                503,
                "the API server that has the round does not answer",
                wanted="the first of --api-server-count, which may still start",
                do="try again",
                retry_after=5,
            )
            await answer(refusal)(scope, receive, send)
            return
        response = StreamingResponse(_body(found), found.status_code)
        response.raw_headers[:] = [pair for pair in found.headers.raw if pair[0].lower() not in _OF_ONE_CONNECTION]
        await response(scope, receive, send)

    @staticmethod
    def _made(request: Request) -> httpx.Request:
        kept = [(name, value) for name, value in request.headers.raw if name not in {*_OF_ONE_CONNECTION, _CLIENT}]
        client = request.client.host if request.client else ""
        has_body = {b"content-length", b"transfer-encoding"} & {name for name, _ in request.headers.raw}
        return httpx.Request(  # made here, as the client would add headers of its own
            request.method,
            httpx.URL("http://owner").copy_with(raw_path=_target(request.scope)),
            headers=[*kept, (_CLIENT, client.encode())],
            content=request.stream() if has_body else None,
        )


def _target(scope: Connection) -> bytes:
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope["query_string"]
    return path + (b"?" + query if query else b"")


async def _body(found: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for part in found.aiter_raw():
            yield part
    finally:
        await found.aclose()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are vLLM's


async def serve_owner(app: ASGIApp, *, prefix: tuple[str, ...], path: Path) -> None:
    """Serve the paths of the service on a socket, for the other API servers, until cancelled.

    Args:
        app: Application of the owner, which starts and ends elsewhere.
        prefix: Beginnings of the paths.
        path: Socket, of which only this user may make use.
    """

    async def only(scope: Connection, receive: Receive, send: Send) -> None:
        if not route_path(scope).startswith(prefix):
            refusal = Refusal(404, scope["path"], wanted="a path of the service", do="ask the port of vLLM")
            await answer(refusal)(scope, receive, send)
            return
        await app(scope, receive, send)

    with socket.socket(socket.AF_UNIX) as listener:
        path.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        # Whoever opens the socket may do what this process may, so the client that it names is believed.
        config = uvicorn.Config(
            only, lifespan="off", log_config=None, access_log=False, server_header=False, forwarded_allow_ips="*"
        )
        await _Server(config).serve(sockets=[listener])
