"""What runs behind an application: threads, background loading, and group commits."""

import asyncio
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Generic, ParamSpec, TypeVar

import structlog

from assay._version import __version__
from assay.errors import StorageError, reason_of
from assay.files.jsonl import JsonObject
from assay.poc.net.metrics import Exported
from assay.poc.net.refusals import Refusal
from assay.poc.net.server_settings import ServerSettings
from assay.poc.net.shares import Shares

if TYPE_CHECKING:
    from assay.poc.net.deployment import Deployment

log = structlog.get_logger("assay.runtime")

P = ParamSpec("P")
T = TypeVar("T")
Item = TypeVar("Item")
Kept = TypeVar("Kept")

THREADS = 8  # calls that wait for the database at the same time
AT_ONCE = 1024  # items of one transaction
# Bytes of items that wait at the same time; one that waits alone may be larger.
MOST_BYTES = 2**26
# Seconds after which :class:`GroupCommit` rests where nothing arrives.
TICK = 1.0


class LoopThread(ABC):
    """A thread that takes turns until it is closed."""

    def __init__(self, name: str) -> None:
        self._state = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, timeout: float | None = None) -> bool:
        """End the thread after its turn; False if it did not end within ``timeout`` seconds."""
        self._closed = True
        self._notify()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @abstractmethod
    def _run(self) -> None:
        """Take turns until ``_closed``."""

    def _notify(self) -> None:
        """Let the thread look again at what it waits for."""
        with self._state:
            self._state.notify_all()

    def _wait(self, seconds: float) -> None:
        """Wait so long, or until the thread is to end."""
        with self._state:
            self._state.wait_for(lambda: self._closed, seconds)


class EngineThread(LoopThread):
    """A thread that loads the model and then runs everything that touches the engine.

    Where ``load`` returns None, the thread ends. The application answers meanwhile.
    """

    def __init__(self, name: str, load: "Callable[[], Deployment | None]") -> None:
        super().__init__(name)
        self._load = load

    def _run(self) -> None:
        deployment = self._load()
        while deployment is not None and not self._closed:
            try:
                self._turn(deployment)
            except Exception as error:  # of any kind: it must not end this thread
                self._turn_failed(error)

    @abstractmethod
    def _turn(self, deployment: "Deployment") -> None:
        """Do one piece of work, or wait for it."""

    @abstractmethod
    def _turn_failed(self, error: Exception) -> None:
        """Take the error that ended a turn, and wait a moment."""


class Runtime(ABC):
    """Base of what runs behind an application; a subclass opens its files and threads.

    The constructor opens what is on disk; :meth:`start` loads the model and begins to work.
    """

    worker: EngineThread
    writers: Sequence[LoopThread]
    """Threads that put things on disk; they are closed after the worker."""

    def __init__(self, server: ServerSettings, metrics: Exported) -> None:
        self.server = server
        self.metrics = metrics
        self._started = time.monotonic()
        self.closing = threading.Event()
        """Set when the end begins, while connections are still open."""
        self.loaded: Future[Deployment] = Future()
        """The deployment, or the error that ended loading."""
        self.failed: Future[None] = Future()
        """The error that ends the process, once one does."""
        self.deployment: Deployment | None = None
        self.ended = True
        """Whether no thread computes any more."""
        self._files = ExitStack()
        """Closes the files that are open."""
        self._threads = ThreadPoolExecutor(THREADS, "assay-database")

    def start(self) -> None:
        """Begin to work, and load the model in the background."""
        for thread in (*self.writers, self.worker):
            thread.start()

    def close(self) -> None:
        """Finish what runs, and close. :attr:`ended` is False afterwards if that took too long."""
        self.closing.set()
        # Nothing is lost with a model that still loads.
        self.ended = self.worker.close(0.0 if self.deployment is None else self.server.drain)
        for writer in self.writers:
            writer.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._files.close()

    def about(self, schema: str) -> JsonObject:
        """Return how every snapshot begins."""
        return {
            "schema": schema,
            "time": time.time(),
            "version": __version__,
            "uptime_seconds": time.monotonic() - self._started,
        }

    @abstractmethod
    def snapshot(self) -> JsonObject:
        """Collect the numbers that readers see, from the database, once a second."""

    @abstractmethod
    def check_ready(self) -> None:
        """Refuse with 503 while the model is not loaded, or after a failure."""

    @abstractmethod
    def tend(self) -> None:
        """Do what is due every second, in a thread."""

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a call that blocks, in a thread kept for that, and wait for its result."""
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, partial(function, *args, **kwargs)
        )

    def load_model(self, load: "Callable[[], Deployment]") -> "Deployment | None":
        """Load the model and start work in the engine's thread; None if that fails."""
        try:
            deployment = load()
            if self.closing.is_set():
                return None
            self._check_model(deployment)
        except Exception as error:  # whatever the loading raises ends the process, with its reason
            self._loading_failed(error)
            self.loaded.set_exception(error)
            return None
        log.info("model loaded", model=deployment.reference, dtype=deployment.dtype)
        self._begin(deployment)
        self.loaded.set_result(deployment)
        return deployment

    @abstractmethod
    def _check_model(self, deployment: "Deployment") -> None:
        """Refuse a model that does not fit the settings."""

    def _loading_failed(self, error: Exception) -> None:
        """Take the error that ended loading."""
        log.error("model not loaded", error=reason_of(error))

    def _begin(self, deployment: "Deployment") -> None:
        """Take the deployment, and continue what was interrupted."""
        self.deployment = deployment


class GroupCommit(LoopThread, Generic[Item, Kept]):
    """Writes items in a thread of its own, in the order in which they came. A subclass says how.

    No more than ``most`` items wait at the same time, a share of them for each client; others are
    refused. What one turn of the event loop puts there goes into one transaction, so that many
    share one wait for the disk. Were the thread woken by the first item, it would wait with that
    item alone, and all others would wait twice.
    """

    def __init__(self, name: str, *, most: int) -> None:
        super().__init__(name)
        self._queue: deque[tuple[Item, int, str | None, Future[Kept]]] = deque()
        self._places = Shares(most)
        self._bytes = Shares(MOST_BYTES)
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

    def check(self, client: str | None = None) -> None:
        """Refuse new items while the queue or the disk is full, or the thread is ending."""
        if self.failing:
            raise self._refusal(
                "the last could not be written" if self.error else "the disk takes nothing"
            )
        with self._state:
            self._check_room(client, 0)

    async def put(self, item: Item, *, size: int = 0, client: str | None = None) -> Kept:
        """Write a client's item of ``size`` bytes; it is on disk when this returns.

        It is refused as :meth:`check` does, and written even if the wait for it is cancelled.
        """
        future = Future[Kept]()
        with self._state:
            self._check_room(client, size)
            self._queue.append((item, size, client, future))
            self._places.take(client)
            self._bytes.take(client, size)
            if not self._waking:
                self._waking = True
                asyncio.get_running_loop().call_soon(self._notify)
        return await asyncio.wrap_future(future)

    def _check_room(self, client: str | None, size: int) -> None:
        if self._closed:
            raise self._refusal("the service is ending")
        if not self._places.fits(client) or (self._queue and not self._bytes.fits(client, size)):
            raise self._refusal(f"{len(self._queue)} messages wait for the disk")

    def _run(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._queue or self._closed, TICK)
                if self._closed and not self._queue:
                    return
                self._waking = False
                entries = [self._queue.popleft() for _ in range(min(AT_ONCE, len(self._queue)))]
                for _, size, client, _ in entries:
                    self._places.give(client)
                    self._bytes.give(client, size)
            if not entries or self._put_on_disk(entries):
                self._try(partial(self._rest, bool(entries)))

    def _put_on_disk(self, entries: "list[tuple[Item, int, str | None, Future[Kept]]]") -> bool:
        """Write items in one transaction and tell who waits for them; return whether they were
        written.
        """
        results: list[Kept] = []
        fault = self._try(lambda: results.extend(self._write([item for item, *_ in entries])))
        answers: Sequence[Kept | Refusal] = (
            results if fault is None else [self._refusal(fault) for _ in entries]
        )
        for (*_, future), result in zip(entries, answers, strict=True):
            if not future.set_running_or_notify_cancel():  # who waited has gone
                continue
            if isinstance(result, Refusal):
                future.set_exception(result)
            else:
                future.set_result(result)
        return fault is None

    def _try(self, step: Callable[[], None]) -> str | None:
        """Take a step, and note whether something can be written; return what was found if nothing
        can.
        """
        try:
            step()
        except StorageError as error:
            fault = error.seen
        except (
            Exception
        ) as error:  # of any kind: without this thread, every caller would wait for ever
            log.exception("not written", thread=self._thread.name)
            self.error = reason_of(error)[:300]
            fault = "it could not be written"
        else:
            self.failing = False
            self.error = None
            return None
        if not self.failing:
            log.warning("what arrives is refused", reason=fault, thread=self._thread.name)
        self.failing = True
        return fault
