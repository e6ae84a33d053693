"""The thread that puts what waits on disk: all of it in one transaction, so that many share one wait for the disk."""

import asyncio
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

import structlog

from assay.errors import StorageError
from assay.poc.service._refusals import Refusal, reason_of

log = structlog.get_logger("assay.store")

Item = TypeVar("Item")
Kept = TypeVar("Kept")

AT_ONCE = 1024  # items of one transaction
TICK = 1.0  # seconds after which :class:`GroupCommit` rests where nothing arrives


class GroupCommit(Generic[Item, Kept]):
    """Writes items in a thread of its own, in the order in which they came.

    Args:
        name: Name of the thread.
        write: Function that writes items in one transaction and returns what is told of each.
        rest: Function that is called after every transaction and where nothing arrives for a second. It raises a
            StorageError where the disk takes nothing.
        refusal: Function that makes the refusal of an item from what was found.
        most: Items that wait at the same time; more are refused.
        most_bytes: Bytes that wait at the same time. An item that waits alone may be larger.
    """

    def __init__(
        self,
        name: str,
        *,
        write: Callable[[list[Item]], Sequence[Kept]],
        rest: Callable[[], None],
        refusal: Callable[[str], Refusal],
        most: int,
        most_bytes: int = 2**26,
    ) -> None:
        self._name, self._write, self._rest, self._refusal = name, write, rest, refusal
        self._most, self._most_bytes = most, most_bytes
        self._state = threading.Condition()
        self._queue: deque[tuple[Item, int, asyncio.Future[Kept]]] = deque()
        self._bytes = 0
        self._closed = False
        self.failing = False
        """Whether the disk takes nothing now."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Write what waits, and end the thread."""
        with self._state:
            self._closed = True
            self._state.notify()
        if self._thread.is_alive():
            self._thread.join()

    def check(self, size: int = 0) -> None:
        """Refuse what could not wait now.

        Raises:
            Refusal: Too much waits already, the disk takes nothing, or the thread is ending.
        """
        if self.failing:
            raise self._refusal("the disk takes nothing")
        with self._state:
            self._check_room(size)

    async def put(self, item: Item, *, size: int = 0) -> Kept:
        """Write an item of ``size`` bytes; return what ``write`` tells of it. It is on disk when this returns.

        An item is written even if the wait for it is cancelled.

        Raises:
            Refusal: Too much waits already, the disk takes nothing, or the thread is ending.
        """
        future: asyncio.Future[Kept] = asyncio.get_running_loop().create_future()
        with self._state:
            self._check_room(size)
            self._queue.append((item, size, future))
            self._bytes += size
            self._state.notify()
        return await future

    def _check_room(self, size: int) -> None:
        if self._closed:
            raise self._refusal("the service is ending")
        if len(self._queue) >= self._most or (self._queue and self._bytes + size > self._most_bytes):
            raise self._refusal(f"{len(self._queue)} messages wait for the disk")

    def _run(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._queue or self._closed, TICK)
                if self._closed and not self._queue:
                    return
                taken = [self._queue.popleft() for _ in range(min(AT_ONCE, len(self._queue)))]
                self._bytes -= sum(size for _, size, _ in taken)
            if not taken or self._put_on_disk(taken):
                self._pause()

    def _put_on_disk(self, taken: "list[tuple[Item, int, asyncio.Future[Kept]]]") -> bool:
        """Write items in one transaction and tell who waits for them; return False if the disk took nothing."""
        futures = [future for _, _, future in taken]
        try:
            kept = self._write([item for item, _, _ in taken])
        except StorageError as error:
            self._fail(error)
            _tell(futures, [self._refusal(error.seen)] * len(taken))
            return False
        except Exception as error:  # of any kind: it must not end this thread
            log.exception("not written", thread=self._name)
            _tell(futures, [self._refusal(reason_of(error))] * len(taken))
            return True
        _tell(futures, kept)
        return True

    def _pause(self) -> None:
        try:
            self._rest()
        except StorageError as error:
            self._fail(error)
        except Exception:  # of any kind: it must not end this thread
            log.exception("not tidied", thread=self._name)
        else:
            self.failing = False

    def _fail(self, error: StorageError) -> None:
        if not self.failing:
            log.warning("messages are refused", reason=error.seen, thread=self._name)
        self.failing = True


def _tell(futures: "list[asyncio.Future[Kept]]", results: "Sequence[Kept | Refusal]") -> None:
    """Give everyone who waits the result, in one call into each loop."""
    waiting = defaultdict(list)
    for future, result in zip(futures, results, strict=True):
        waiting[future.get_loop()].append((future, result))
    for loop, pairs in waiting.items():
        with suppress(RuntimeError):  # the loop has ended, and with it everyone who waited
            loop.call_soon_threadsafe(_settle, pairs)


def _settle(pairs: "list[tuple[asyncio.Future[Kept], Kept | Refusal]]") -> None:
    for future, result in pairs:
        if future.done():  # who waited has gone
            continue
        if isinstance(result, Refusal):
            future.set_exception(result)
        else:
            future.set_result(result)
