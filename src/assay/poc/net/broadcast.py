"""One text for many readers: the latest snapshot, and the event streams that follow it."""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator

from assay.poc.net.refusals import Refusal


class Broadcast:
    """Hands the latest snapshot to server-sent event streams.

    Args:
        closing: Event that is set when the server begins to end; it ends every stream.
        most: Streams that are open at the same time.
        most_of_client: Streams that one client has open at the same time.
    """

    def __init__(self, closing: threading.Event, *, most: int, most_of_client: int) -> None:
        self._closing, self._most, self._most_of_client = closing, most, most_of_client
        self._changed = asyncio.Condition()
        self._streams: Counter[object] = Counter()
        self.latest = b""
        """The latest snapshot, as JSON."""

    async def publish(self, text: bytes) -> None:
        """Give a snapshot to every open stream."""
        async with self._changed:
            self.latest = text
            self._changed.notify_all()

    async def stream(self, client: object = None) -> AsyncIterator[bytes]:
        """Return server-sent events until the reader ``client`` leaves or the server closes.

        Raises:
            Refusal: 429, too many streams are open, of this reader or of all.
        """
        limits = ((self._streams.total(), self._most), (self._streams[client], self._most_of_client))
        for are_open, most in limits:
            if are_open >= most:
                seen, do = f"{most} event streams are open", "close one, or poll /status"
                raise Refusal(429, seen, wanted="fewer", do=do, retry_after=10)
        events = self._events(client)
        await anext(events)  # counts the stream before another reader is looked at: nothing is waited for here
        return events

    async def _events(self, client: object) -> AsyncIterator[bytes]:
        self._streams[client] += 1
        try:
            yield b""  # taken by stream()
            yield b"retry: 2000\n\n"
            while not self._closing.is_set():
                yield b"event: snapshot\ndata: " + self.latest + b"\n\n"
                async with self._changed:
                    await self._changed.wait()
        finally:
            self._streams[client] -= 1
            self._streams += Counter()  # forget clients without a stream
