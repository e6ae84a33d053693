"""Delivery of callbacks: at least once, in any order, with pauses that grow."""

import asyncio
import random
import time
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial

import httpx
import structlog
from standardwebhooks import Webhook

from assay.errors import StorageError
from assay.poc.net.guard import Blocked, call, new_client
from assay.poc.net.runtime import Runtime
from assay.poc.service.metrics import Metrics
from assay.poc.service.outbox import Callback, Outbox
from assay.poc.service.settings import Settings

log = structlog.get_logger("assay.callbacks")

TICK = 0.5  # seconds between two looks into the outbox when no commit wakes the sender
MAX_RETRY_AFTER = 86_400.0
SET_BACK = 5.0  # seconds by which the clock may fall behind before pauses are forgotten


class Delivery:
    """Sends the callbacks that an outbox owes, until ``runtime`` ends."""

    def __init__(self, outbox: Outbox, runtime: Runtime, settings: Settings, metrics: Metrics) -> None:
        self._outbox, self._runtime, self._settings, self._metrics = outbox, runtime, settings, metrics
        self._signers = [Webhook(secret) for secret in self._settings.callback_secrets]
        self._sending: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._started_at = _since_start()

    async def run(self) -> None:
        """Deliver until cancelled, then wait for the deliveries that run."""
        loop = asyncio.get_running_loop()
        async with new_client(self._settings.callback_timeout, self._settings.callback_concurrency) as client:
            self._outbox.notify = partial(loop.call_soon_threadsafe, self._wake.set)
            try:
                while True:
                    await self._serve(client)
            finally:
                self._outbox.notify = lambda: None
                await asyncio.gather(*self._sending.values(), return_exceptions=True)

    async def _serve(self, client: httpx.AsyncClient) -> None:
        self._wake.clear()
        try:
            await self._start_due(client)
        except StorageError as error:
            log.warning("outbox not readable", reason=error.seen)
            await asyncio.sleep(1.0)
        with suppress(TimeoutError):
            async with asyncio.timeout(TICK):
                await self._wake.wait()

    async def _start_due(self, client: httpx.AsyncClient) -> None:
        outbox, wait_for = self._outbox, self._runtime.call
        started_at = _since_start()
        if started_at < self._started_at - SET_BACK:
            log.warning("the clock was set back, so every pending callback is due now")
            await wait_for(outbox.retry_now)
        self._started_at = started_at
        await wait_for(outbox.close_open, self._settings.callback_interval)
        room = self._settings.callback_concurrency - len(self._sending)
        if room <= 0:
            return
        for callback, body in await wait_for(outbox.due, room, besides=list(self._sending)):
            self._sending[callback.id] = asyncio.create_task(self._deliver(client, callback, body))

    async def _deliver(self, client: httpx.AsyncClient, callback: Callback, body: str) -> None:
        started = time.perf_counter()
        try:
            error, wait = await self._send(client, callback, body)
            self._metrics.delivery_seconds.observe(time.perf_counter() - started)
            await self._note(callback, error, wait)
        finally:
            self._sending.pop(callback.id, None)
            self._wake.set()

    async def _send(self, client: httpx.AsyncClient, callback: Callback, body: str) -> tuple[str | None, float]:
        """Send once; return the fault, and the pause that the receiver asks for: infinite if no attempt can succeed."""
        try:
            async with asyncio.timeout(self._settings.callback_timeout):
                response = await call(
                    client,
                    "POST",
                    callback.url,
                    f"/{callback.kind}",
                    allow_private=self._settings.allow_private_callbacks,
                    headers=self._headers(callback.id, body),
                    content=body.encode(),
                )
                await response.aclose()
        except Blocked as error:
            return str(error), float("inf")
        except TimeoutError:
            return f"no answer in {self._settings.callback_timeout:g} s", 0.0
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return f"{type(error).__name__}: {error}"[:200], 0.0
        if response.is_success:
            return None, 0.0
        return f"HTTP {response.status_code}", retry_after(response.headers.get("retry-after"))

    def _headers(self, callback_id: str, body: str) -> dict[str, str]:
        now = datetime.now(UTC)
        headers = {
            "Content-Type": "application/json",
            "webhook-id": callback_id,
            "webhook-timestamp": str(int(now.timestamp())),
        }
        if self._signers:
            signatures = (signer.sign(callback_id, now, body) for signer in self._signers)
            headers["webhook-signature"] = " ".join(signatures)
        return headers

    async def _note(self, callback: Callback, error: str | None, wait: float) -> None:
        """Write the outcome, however long the disk is full: otherwise the callback would be sent again at once."""
        settings = self._settings
        last = callback.attempts + 1 >= settings.callback_attempts or wait == float("inf")
        pause = max(backoff(callback.attempts, settings.callback_backoff, settings.callback_backoff_max), wait)
        outcome = "delivered" if error is None else "dead" if last else "failed"
        self._metrics.deliveries.labels(outcome).inc()
        about = {"outcome": outcome, "kind": callback.kind, "id": callback.id, "attempt": callback.attempts + 1}
        log.info("callback", **about) if error is None else log.warning("callback", **about, error=error)
        attempted, retry_in = self._outbox.attempted, None if last else pause
        while True:
            try:
                await self._runtime.call(attempted, callback.id, error, retry_in=retry_in)
                return
            except StorageError:
                if self._runtime.closing.is_set():
                    return
                await asyncio.sleep(1.0)


def _since_start() -> float:
    """Return the time of the clock when the machine started. It changes only when the clock is set."""
    return time.time() - time.monotonic()


def backoff(attempts: int, base: float, longest: float) -> float:
    """Return the pause before the next attempt: it doubles up to a bound, and is cut by up to half at random."""
    return min(longest, base * 2.0 ** min(attempts, 60)) * random.uniform(0.5, 1.0)


def retry_after(value: str | None, now: datetime | None = None) -> float:
    """Return the seconds that a ``Retry-After`` header asks for, at most a day; 0 if it cannot be read."""
    if not value:
        return 0.0
    try:
        if value.strip().isdigit():
            seconds = float(value)
        else:
            date = parsedate_to_datetime(value)
            date = date if date.tzinfo else date.replace(tzinfo=UTC)
            seconds = (date - (now or datetime.now(UTC))).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)
