"""The thread that puts what waits on disk: all of it in one transaction, so that many share one wait for the disk.

What one turn of the event loop puts there goes into one transaction. Were the thread woken by the first item, it would
wait for the disk with that item alone, and all others would wait twice.
"""

import asyncio
from abc import abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Generic, TypeVar

import structlog

from assay.errors import StorageError, reason_of
from assay.poc.net.refusals import Refusal
from assay.poc.net.runtime import LoopThread

log = structlog.get_logger("assay.store")

Item = TypeVar("Item")
Kept = TypeVar("Kept")

AT_ONCE = 1024  # items of one transaction
MOST_BYTES = 2**26  # that wait at the same time; an item that waits alone may be larger
TICK = 1.0  # seconds after which :class:`GroupCommit` rests where nothing arrives


class GroupCommit(LoopThread, Generic[Item, Kept]):
    """Writes items in a thread of its own, in the order in which they came. A subclass says how.

    No more than ``most`` items wait at the same time; others are refused.
    """

    def __init__(self, name: str, *, most: int) -> None:
        super().__init__(name)
        self._name, self._most = name, most
        self._queue: deque[tuple[Item, int, asyncio.Future[Kept]]] = deque()
        self._bytes = 0
        self._waking = False
        self.failing = False
        """Whether nothing can be written now."""
        self.error: str | None = None
        """Fault of the code because of which nothing can be written, if it is not the disk."""

    @abstractmethod
    def _write(self, items: list[Item]) -> Sequence[Kept]:
        """Write items in one transaction, and return what is told of each."""

    def _rest(self, wrote: bool) -> None:
        """Do what is due after a transaction, or where nothing has arrived for a second."""

    @abstractmethod
    def _refusal(self, seen: str) -> Refusal:
        """Return the refusal of an item."""

    @property
    def waiting(self) -> int:
        """How many items wait for their transaction."""
        return len(self._queue)

    def check(self, size: int = 0) -> None:
        """Refuse what could not wait now: too much does, the disk takes nothing, or the thread is ending."""
        if self.failing:
            raise self._refusal("the last could not be written" if self.error else "the disk takes nothing")
        with self._state:
            self._check_room(size)

    async def put(self, item: Item, *, size: int = 0) -> Kept:
        """Write an item of ``size`` bytes; return what ``_write`` tells of it. It is on disk when this returns.

        It is refused as :meth:`check` does, and written even if the wait for it is cancelled.
        """
        future: asyncio.Future[Kept] = asyncio.get_running_loop().create_future()
        with self._state:
            self._check_room(size)
            self._queue.append((item, size, future))
            self._bytes += size
            if not self._waking:
                self._waking = True
                future.get_loop().call_soon(self._notify)
        return await future

    def _check_room(self, size: int) -> None:
        if self._closed:
            raise self._refusal("the service is ending")
        if self.waiting >= self._most or (self._queue and self._bytes + size > MOST_BYTES):
            raise self._refusal(f"{self.waiting} messages wait for the disk")

    def _run(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._queue or self._closed, TICK)
                if self._closed and not self._queue:
                    return
                self._waking = False
                taken = [self._queue.popleft() for _ in range(min(AT_ONCE, len(self._queue)))]
                self._bytes -= sum(size for _, size, _ in taken)
            if not taken or self._put_on_disk(taken):
                self._try(partial(self._rest, bool(taken)))

    def _put_on_disk(self, taken: "list[tuple[Item, int, asyncio.Future[Kept]]]") -> bool:
        """Write items in one transaction and tell who waits for them; return whether they were written."""
        kept: list[Kept] = []
        fault = self._try(lambda: kept.extend(self._write([item for item, _, _ in taken])))
        told = kept if fault is None else [self._refusal(fault) for _ in taken]
        _tell([future for _, _, future in taken], told)
        return fault is None

    def _try(self, step: Callable[[], None]) -> str | None:
        """Take a step, and note whether something can be written; return what was found if nothing can."""
        try:
            step()
        except StorageError as error:
            fault = error.seen
        except Exception as error:  # of any kind: without this thread, every caller would wait for ever
            log.exception("not written", thread=self._name)
            self.error = reason_of(error)[:300]
            fault = "it could not be written"
        else:
            self.failing, self.error = False, None
            return None
        if not self.failing:
            log.warning("what arrives is refused", reason=fault, thread=self._name)
        self.failing = True
        return fault


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
