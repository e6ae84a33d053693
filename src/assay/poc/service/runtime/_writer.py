"""The writer: takes batches from the engine through a short queue and puts them on disk.

The queue connects the speed of the engine to that of the disk and of the receiver of callbacks: while the disk is full,
or too many callbacks of the round are undelivered, it stays full and the engine waits. Nothing is dropped.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from assay.errors import StorageError
from assay.poc.service._settings import Settings
from assay.poc.service.store import Batch, Rounds

Paused = Literal["storage", "callbacks"]

QUEUE = 8  # batches between engine and disk
STORAGE_PAUSE = 1.0
CALLBACK_PAUSE = 0.2


class Writer:
    """A thread that commits batches in order, several in one transaction where they have piled up.

    Args:
        rounds: Rounds that take the batches, and know how many callbacks of a round are undelivered.
        settings: Bounds and intervals.
        committed: Receives the batches of every transaction, and its seconds.
        changed: Is called when ``paused`` changes.
        failed: Receives an error that waiting does not cure.
    """

    def __init__(
        self,
        rounds: Rounds,
        settings: Settings,
        *,
        committed: Callable[[list[Batch], float], None],
        changed: Callable[[], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._rounds, self._settings = rounds, settings
        self._committed, self._changed, self._failed = committed, changed, failed
        self._state = threading.Condition()
        self._queue: deque[Batch] = deque()
        self._epoch = 0
        self._busy = False
        self._closed = False
        self.paused: Paused | None = None
        self._thread = threading.Thread(target=self._run, name="assay-writer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, batch: Batch) -> bool:
        """Queue a batch, waiting for room; return False if its epoch has ended and it is no longer wanted."""
        with self._state:
            self._state.wait_for(lambda: len(self._queue) < QUEUE or batch.epoch != self._epoch or self._closed)
            if batch.epoch != self._epoch or self._closed:
                return False
            self._queue.append(batch)
            self._state.notify_all()
            return True

    def begin(self, epoch: int, timeout: float = 5.0) -> None:
        """End the current epoch and begin another.

        Queued batches are still written, however many callbacks are undelivered. Those that cannot be written within
        ``timeout`` seconds are dropped: they were never acknowledged, and the round continues before them.
        """
        with self._state:
            self._epoch = epoch
            self._state.notify_all()
            written = self._state.wait_for(lambda: not self._queue and not self._busy, timeout)
            if not written:
                self._queue.clear()
                self._state.notify_all()
                self._state.wait_for(lambda: not self._busy)

    def close(self) -> None:
        """Write what is queued and end the thread."""
        with self._state:
            epoch = self._epoch + 1
        self.begin(epoch)
        with self._state:
            self._closed = True
            self._state.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                self._busy = True
            error = self._write()
            with self._state:
                self._busy = False
                self._state.notify_all()
            if error is not None:
                # Only now: the receiver of the error may wait for this thread to be idle.
                self._failed(error)

    def _write(self) -> Exception | None:
        """Commit what is queued, or wait a moment if that is not possible now.

        Returns an error that waiting does not cure.
        """
        with self._state:
            batches = list(self._queue)
            wanted = batches[0].epoch == self._epoch
        try:
            if wanted and self._rounds.owed(batches[0].round_id) >= self._settings.max_pending:
                self._pause("callbacks", CALLBACK_PAUSE)
                return None
            started = time.perf_counter()
            self._rounds.commit(batches, interval=self._settings.callback_interval, most=self._settings.callback_nonces)
        except StorageError:
            self._pause("storage", STORAGE_PAUSE)
            return None
        except Exception as error:
            # Two results for one nonce, or a round that was deleted: waiting does not help.
            self._take(len(batches))
            return error
        self._take(len(batches))
        self._pause(None)
        self._committed(batches, time.perf_counter() - started)
        return None

    def _take(self, count: int) -> None:
        with self._state:
            for _ in range(min(count, len(self._queue))):
                self._queue.popleft()
            self._state.notify_all()

    def _pause(self, reason: Paused | None, seconds: float = 0.0) -> None:
        if reason != self.paused:
            self.paused = reason
            self._changed()
        if seconds:
            with self._state:
                epoch = self._epoch
                self._state.wait_for(lambda: self._closed or self._epoch != epoch or not self._queue, seconds)
