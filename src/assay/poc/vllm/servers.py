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
from pathlib import Path
from typing import Any

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


def place_of(arguments: Namespace) -> tuple[int, int]:
    """Return the number of this API server, from 0, by which vLLM names its process, and how many there are."""
    numbered = _NUMBERED.fullmatch(multiprocessing.current_process().name)
    return (int(numbered[1]), arguments.api_server_count) if numbered else (0, 1)


class ApiServers:
    """What so many API servers of an engine know of each other, an integer of each, by a file in the data directory.

    The first one tells whether a round has the engine to itself, the others how many of their requests are unfinished.
    One server alone writes nothing; a StorageError says that the directory cannot be written.
    """

    def __init__(self, folder: Path, index: int = 0, count: int = 1) -> None:
        self.index, self.count, self.path = index, count, folder / SOCKET
        memory: Any = bytearray(ITEM)
        if count > 1:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(folder / COUNTS, os.O_RDWR | os.O_CREAT, 0o600)
                with os.fdopen(descriptor, "r+b") as file:
                    # Never made shorter: a server that has it open would end where it reads beyond.
                    os.ftruncate(file.fileno(), max(ITEM * count, os.fstat(file.fileno()).st_size))
                    memory = mmap.mmap(file.fileno(), ITEM * count)
            except OSError as error:
                raise storage_error(folder, error) from None
        self._values = memoryview(memory).cast("q")
        self.tell(0)

    @property
    def elsewhere(self) -> int:
        """Number of requests that are unfinished in the other servers, as the first one sees it."""
        return sum(self._values[1:])

    @property
    def closed(self) -> bool:
        """Whether a round has the engine to itself."""
        return bool(self._values[0])

    def tell(self, value: int) -> None:
        """Tell the others the value of this server."""
        self._values[self.index] = value

    async def keep_telling(self, look: Callable[[], int]) -> None:
        """Tell the others what this server sees, again and again, until cancelled."""
        while True:
            self.tell(look())
            await asyncio.sleep(PAUSE)


class PassOn:
    """Sends the requests of some paths to the API server that owns the round, over its socket, and its answers back.

    The owner checks keys and bounds bodies. A client that leaves ends its request there too.
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
            found = await self._client.send(_owners_request(request), stream=True)
        except ClientDisconnect:
            return
        except httpx.TransportError:
            seen = "the API server that has the round does not answer"
            wanted = "the first of --api-server-count, which may still start"
            await answer(Refusal(503, seen, wanted=wanted, do="try again", retry_after=5))(scope, receive, send)
            return
        except (httpx.InvalidURL, UnicodeError):
            seen, wanted = "a path or a query that cannot be passed on", "printable ASCII, and at most 64 KiB of it"
            await answer(Refusal(400, seen, wanted=wanted, do="percent-encode other characters"))(scope, receive, send)
            return
        response = StreamingResponse(_body(found), found.status_code)
        response.raw_headers[:] = [pair for pair in found.headers.raw if pair[0].lower() not in _OF_ONE_CONNECTION]
        await response(scope, receive, send)


def _owners_request(request: Request) -> httpx.Request:
    kept = [(name, value) for name, value in request.headers.raw if name not in {*_OF_ONE_CONNECTION, _CLIENT}]
    client, query = request.client.host if request.client else "", request.scope["query_string"]
    path = request.scope.get("raw_path") or request.scope["path"].encode()
    has_body = {b"content-length", b"transfer-encoding"} & {name for name, _ in request.headers.raw}
    return httpx.Request(  # made here, as the client would add headers of its own
        request.method,
        httpx.URL("http://owner").copy_with(raw_path=path + (b"?" + query if query else b"")),
        headers=[*kept, (_CLIENT, client.encode())],
        content=request.stream() if has_body else None,
    )


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

    The application starts and ends elsewhere, and only this user may make use of the socket.
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
