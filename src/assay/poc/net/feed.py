"""The latest snapshot of an application, made once for all readers, and the event streams that follow it."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import structlog
from starlette.requests import Request
from starlette.responses import StreamingResponse

from assay.errors import AssayError
from assay.files.jsonl import JsonObject, dumps
from assay.poc.net.refusals import Refusal
from assay.poc.net.runtime import Runtime

log = structlog.get_logger("assay.feed")

PERIOD = 1.0


class Feed:
    """Makes a snapshot every second, for event streams, metrics and pages.

    Args:
        runtime: What the snapshots are of. Its end ends every stream.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._changed = asyncio.Condition()
        self._streams: Counter[object] = Counter()
        self.values: JsonObject = {}
        """The latest snapshot."""
        self.latest = b""
        """The latest snapshot, as JSON."""

    async def run(self) -> None:
        """Refresh every second until cancelled, and let the runtime do what is due."""
        while True:
            await asyncio.sleep(PERIOD)
            try:
                await self.refresh()
                await self._runtime.call(self._runtime.tend)
            except AssayError as error:
                log.warning("snapshot", reason=error.seen)

    async def refresh(self) -> None:
        """Make a snapshot now, and give it to every open stream."""
        self.values = await self._runtime.call(self._runtime.snapshot)
        async with self._changed:
            self.latest = dumps(self.values).encode()
            self._changed.notify_all()

    async def stream(self, client: object = None) -> AsyncIterator[bytes]:
        """Return server-sent events until the reader ``client`` leaves or the server closes.

        Raises:
            Refusal: 429, too many streams are open, of this reader or of all.
        """
        server = self._runtime.server
        limits = ((self._streams.total(), server.max_streams), (self._streams[client], server.max_client_streams))
        for are_open, most in limits:
            if are_open >= most:
                seen, do = f"{most} event streams are open", "close one, or poll /status"
                raise Refusal(429, seen, wanted="fewer", do=do, retry_after=10)
        events = self._events(client)
        await anext(events)  # counts the stream before another reader is looked at: nothing is waited for here
        return events

    async def respond(self, request: Request) -> StreamingResponse:
        """Return a stream as the answer to a request."""
        # Behind a proxy all clients have one address, and those with keys are told apart by them.
        client = (request.client.host if request.client else "", request.headers.get("authorization"))
        stream = await self.stream(client)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    async def _events(self, client: object) -> AsyncIterator[bytes]:
        self._streams[client] += 1
        try:
            yield b""  # taken by stream()
            yield b"retry: 2000\n\n"
            while not self._runtime.closing.is_set():
                yield b"event: snapshot\ndata: " + self.latest + b"\n\n"
                async with self._changed:
                    await self._changed.wait()
        finally:
            self._streams[client] -= 1
            self._streams += Counter()  # forget clients without a stream
