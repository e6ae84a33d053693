"""Bounds on connections and on the heads of requests, which hold before any key is checked.

uvicorn bounds neither: a client without a key could hold every connection, or send one header that never ends.
"""

import asyncio
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from assay.poc.service._refusals import Refusal
from assay.poc.service._settings import Limits
from assay.reports import dumps

MAX_HEADERS = 100


class Bounded(HttpToolsProtocol):
    """uvicorn's HTTP protocol with bounds.

    Too many connections are answered with 503, a head that is too large with 431, and one that is too slow with 408;
    then the connection is closed.
    """

    limits = Limits()
    _unparsed = 0  # bytes since the last part of a message was whole; the parser keeps them in memory
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(503, f"{self.limits.max_connections} connections are open", "fewer", "try again later")
        else:
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            self._start_timer()  # the first bytes of the next head, or a body that the last answer did not wait for
        self._unparsed += len(data)
        super().data_received(data)
        if self._unparsed > self.limits.max_header and not self.transport.is_closing():
            self._refuse_head()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._unparsed = 0
        if self.transport.is_closing():
            return
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self.limits.max_header or len(self.headers) > MAX_HEADERS:
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
            self._timer = self.loop.call_later(self.limits.header_timeout, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        if not self.transport.is_closing():
            wanted = f"its head within {self.limits.header_timeout:g} s"
            self._refuse(408, "a request that does not come to its end", wanted, "send it at once")

    def _refuse_head(self) -> None:
        wanted = f"at most {self.limits.max_header} bytes and {MAX_HEADERS} headers"
        self._refuse(431, "the head of the request is too large", wanted, "send less")

    def _refuse(self, status: int, seen: str, wanted: str, do: str) -> None:
        body = dumps(Refusal(status, seen, wanted=wanted, do=do).body).encode()
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self._stop_timer()
        self.transport.write(head.encode() + body)
        self.transport.close()


def bounded(limits: Limits) -> type[asyncio.Protocol]:
    """Return the protocol with other bounds than the default ones."""
    return type("Bounded", (Bounded,), {"limits": limits})
