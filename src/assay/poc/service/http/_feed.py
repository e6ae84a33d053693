"""One snapshot per second, made once for all readers."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator

import structlog

from assay.errors import AssayError
from assay.poc.service._refusals import Refusal
from assay.poc.service.http._views import snapshot, status
from assay.poc.service.runtime import Controller
from assay.reports import dumps

log = structlog.get_logger("assay.feed")

PERIOD = 1.0
STATUS_AGE = 0.1  # seconds for which an encoded /status is reused while nothing changes
PRUNE_EVERY = 600.0


class Feed:
    """Keeps the latest snapshot and hands it to event streams, metrics and the dashboard.

    Args:
        controller: Controller that is shown.
    """

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._latest = b""
        self._changed = asyncio.Condition()
        self._streams: Counter[object] = Counter()
        self._status = b""
        self._status_key: object = None
        self._status_until = 0.0

    async def run(self) -> None:
        """Refresh the snapshot every second until cancelled, and delete what is old from the database."""
        pruned = 0.0
        while True:
            started = time.monotonic()
            try:
                await self.refresh()
                await self._controller.call(self._controller.save_if_needed)
                if started - pruned > PRUNE_EVERY:
                    await self._controller.call(self._prune)
                    pruned = started
            except AssayError as error:
                log.warning("snapshot", reason=error.seen)
            await asyncio.sleep(max(0.0, PERIOD - (time.monotonic() - started)))

    async def refresh(self) -> None:
        """Make a snapshot now."""
        values = await self._controller.call(snapshot, self._controller)
        async with self._changed:
            self._latest = dumps(values).encode()
            self._changed.notify_all()

    def latest(self) -> bytes:
        """Return the latest snapshot as JSON."""
        return self._latest

    def status(self) -> bytes:
        """Return the body of ``/status``, encoded once for many readers."""
        progress = self._controller.progress
        key = (self._controller.state, self._controller.error, id(progress), progress and progress.checked)
        now = time.monotonic()
        if key != self._status_key or now > self._status_until:
            self._status = dumps(status(self._controller)).encode()
            self._status_key, self._status_until = key, now + STATUS_AGE
        return self._status

    def stream(self, client: object = None) -> AsyncIterator[bytes]:
        """Return server-sent events until the reader leaves or the service closes.

        Args:
            client: Identity of the reader, of whose streams only so many may be open.

        Raises:
            Refusal: 429, too many streams are open.
        """
        settings = self._controller.settings
        for are_open, most in (
            (self._streams.total(), settings.max_streams),
            (self._streams[client], settings.max_client_streams),
        ):
            if are_open >= most:
                seen, do = f"{most} event streams are open", "close one, or poll /status"
                raise Refusal(429, seen, wanted="fewer", do=do, retry_after=10)
        return self._events(client)

    async def _events(self, client: object) -> AsyncIterator[bytes]:
        self._streams[client] += 1
        try:
            yield b"retry: 2000\n\n"
            while not self._controller.closing.is_set():
                yield b"event: snapshot\ndata: " + self._latest + b"\n\n"
                async with self._changed:
                    await self._changed.wait()
        finally:
            self._streams[client] -= 1
            self._streams += Counter()  # forget clients without a stream

    def _prune(self) -> None:
        keep = self._controller.settings.keep_rounds
        self._controller.rounds.prune(keep)
        self._controller.outbox.prune(keep)
        self._controller.jobs.prune()
