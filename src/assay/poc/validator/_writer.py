"""The thread that puts messages on disk: all that wait in one transaction, so that many share one wait for the disk."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence

import structlog

from assay.errors import StorageError
from assay.poc.service.http import Refusal
from assay.poc.validator._inbox import Inbox, Message
from assay.poc.validator._metrics import Metrics

log = structlog.get_logger("assay.validator.inbox")

AT_ONCE = 1024  # messages of one transaction
TICK = 1.0  # seconds after which epochs are looked at where nothing arrives
PRUNE_EVERY = 5.0
STORAGE_PAUSE = 1.0


class Writer:
    """Keeps messages, in a thread of its own.

    Args:
        inbox: Inbox that this thread alone adds to.
        metrics: Metrics of the validator.
        most: Messages that wait at the same time; more are refused.
        keep: Seconds for which messages are kept.
    """

    def __init__(self, inbox: Inbox, metrics: Metrics, *, most: int, keep: float) -> None:
        self._inbox, self._metrics, self._most, self._keep = inbox, metrics, most, keep
        self._state = threading.Condition()
        self._queue: deque[tuple[Message, asyncio.Future[bool]]] = deque()
        self._closed = False
        self._pruned = time.monotonic()
        self.failing = False
        """Whether the disk takes nothing now."""
        self.error: str | None = None
        """Fault of the code that kept the last messages from being written; None where there was none."""
        self._thread = threading.Thread(target=self._run, name="assay-inbox", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    async def keep(self, message: Message) -> bool:
        """Keep a message; return whether it is new. It is on disk when this returns.

        Raises:
            Refusal: 503, too many messages wait already, or the disk takes nothing.
        """
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        with self._state:
            if len(self._queue) >= self._most or self._closed:
                raise busy(f"{len(self._queue)} messages wait for the disk")
            self._queue.append((message, future))
            self._state.notify()
        return await future

    def close(self) -> None:
        """Keep what waits, and end the thread."""
        with self._state:
            self._closed = True
            self._state.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._queue or self._closed, TICK)
                if self._closed and not self._queue:
                    return
                taken = [self._queue.popleft() for _ in range(min(AT_ONCE, len(self._queue)))]
            self._write(taken)

    def _write(self, taken: list[tuple[Message, "asyncio.Future[bool]"]]) -> None:
        started = time.perf_counter()
        try:
            if taken:
                fresh = self._inbox.add([message for message, _ in taken])
                self._metrics.commit_seconds.observe(time.perf_counter() - started)
                self._metrics.commit_messages.observe(len(taken))
            else:
                fresh = []
                self._inbox.roll()
            self._prune()
            self.failing, self.error = False, None
        except StorageError as error:
            self._fail(taken, error.seen)
            return
        except Exception as error:  # without this thread every sender would wait for ever
            log.exception("messages were not written")
            self.error = f"{type(error).__name__}: {error}"[:300]
            self._fail(taken, "the messages could not be written")
            return
        for (message, _), new in zip(taken, fresh, strict=True):
            self._metrics.messages.labels(message.kind, "new" if new else "repeated").inc()
        _tell([future for _, future in taken], fresh)

    def _prune(self) -> None:
        if time.monotonic() - self._pruned > PRUNE_EVERY:
            self._inbox.prune(self._keep)
            self._pruned = time.monotonic()

    def _fail(self, taken: list[tuple[Message, "asyncio.Future[bool]"]], seen: str) -> None:
        if not self.failing:
            log.warning("messages are refused", reason=seen)
        self.failing = True
        _tell([future for _, future in taken], [busy(seen)] * len(taken))
        if not taken:
            time.sleep(STORAGE_PAUSE)


def busy(seen: str) -> Refusal:
    """Return the refusal of a message that cannot be kept now."""
    return Refusal(503, seen, wanted="room", do="send it again", retry_after=1, fields={"fields": ["busy"]})


def _tell(futures: "list[asyncio.Future[bool]]", results: "Sequence[bool | Refusal]") -> None:
    """Give every waiting request its result, in one call into its loop."""

    def settle() -> None:
        for future, result in zip(futures, results, strict=True):
            if future.done():  # the sender has gone
                continue
            if isinstance(result, Refusal):
                future.set_exception(result)
            else:
                future.set_result(result)

    if futures:
        futures[0].get_loop().call_soon_threadsafe(settle)
