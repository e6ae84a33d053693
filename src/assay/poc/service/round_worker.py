"""Two threads of the service: the worker runs the engine, the writer stores its batches.

torch and the compiled streams release the interpreter while they compute, so the event loop answers
meanwhile. The short queue between both connects the speed of the engine to that of the disk and of
the receiver of callbacks: while the disk is full, or too many callbacks of the round are
undelivered, it stays full and the engine waits. Nothing is dropped.
"""

import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Literal

import structlog
from typing_extensions import override

from assay.errors import AssayError, BadWeights, StorageError
from assay.poc.net.deployment import Deployment
from assay.poc.net.runtime import EngineThread, LoopThread
from assay.poc.protocol.checks import MAX_NONCE
from assay.poc.protocol.records import Record, is_distance, is_valid
from assay.poc.service.jobs import STORAGE_PAUSE, Jobs
from assay.poc.service.outbox import Outbox
from assay.poc.service.rounds import ComputedBatch, Rounds, StoredRound
from assay.poc.service.service_settings import ServiceSettings

log = structlog.get_logger("assay.controller")

Paused = Literal["storage", "callbacks"]

QUEUE = 8  # batches between engine and disk
ENDED = -1  # an epoch that no batch is of
CALLBACK_PAUSE = 0.2


class ShareDone(AssayError):
    """Every nonce of a node's share is computed, so that its round has ended."""


class Worker(EngineThread):
    """A thread that runs everything that touches the engine, one batch at a time.

    Validations come first, then the round, whose batches go to ``writer``, then artifact jobs.
    ``begun`` is called after the first batch of a round and of what is left of one, and ``failed``
    receives the error that ended a round, and the epoch of its batch.
    """

    def __init__(
        self,
        load: Callable[[], Deployment | None],
        writer: "Writer",
        jobs: Jobs,
        *,
        begun: Callable[[Deployment, StoredRound], None],
        failed: Callable[[Exception, int | None], None],
    ) -> None:
        super().__init__("assay-engine", load)
        self._writer = writer
        self._begun = begun
        self._background = jobs.step
        self._failed = failed
        self._tasks: deque[Callable[[Deployment], None]] = deque()
        self._round: StoredRound | None = None
        self._epoch = 0
        self._stream: Generator[list[Record], None, None] | None = None
        self._stream_epoch = -1
        self._has_background = False

    def generate(self, stored: StoredRound | None, epoch: int) -> None:
        """Generate from ``stored.next_nonce`` on, or stop after the running batch if None."""
        with self._state:
            self._round = stored
            self._epoch = epoch
        self._notify()

    def submit(self, task: Callable[[Deployment], None]) -> None:
        """Queue a task."""
        self._tasks.append(task)
        self._notify()

    def wake(self) -> None:
        """Say that there is background work."""
        self._has_background = True
        self._notify()

    @override
    def close(self, timeout: float | None = None) -> bool:
        self._writer.make_room()  # or the batch that runs would wait for disk or receiver
        return super().close(timeout)

    @override
    def _run(self) -> None:
        super()._run()
        self._drop_stream()

    @override
    def _turn(self, deployment: Deployment) -> None:
        with self._state:
            self._state.wait_for(
                lambda: self._closed or self._tasks or self._round or self._has_background
            )
            if self._closed:
                return
            task = self._tasks.popleft() if self._tasks else None
            stored = self._round
            epoch = self._epoch
            if task is None and stored is None:
                self._has_background = False
        if task is not None:
            # An open round has its next batches queued on the engine, and the task comes first.
            self._drop_stream()
            task(deployment)
        elif stored is not None:
            self._generate(deployment, stored, epoch)
        elif self._background(deployment):
            self.wake()

    @override
    def _turn_failed(self, error: Exception) -> None:
        self._failed(error, None)
        self._wait(1.0)

    def _generate(self, deployment: Deployment, stored: StoredRound, epoch: int) -> None:
        """Do one batch of the round."""
        try:
            if first := self._stream is None or self._stream_epoch != epoch:
                self._drop_stream()
                share = range(stored.next_nonce, MAX_NONCE + 1, stored.round.node_count)
                self._stream = deployment.compute(stored.round.inputs(share), stored.batch_size)
                self._stream_epoch = epoch
            started = time.perf_counter()
            records = next(self._stream, None)
            if records is None:
                raise ShareDone(
                    f"the share is done: node {stored.round.node_id} of {stored.round.node_count} "
                    f"has no nonce left",
                    wanted="a round that has nonces left",
                    do="begin another round",
                )
            batch = _batch(stored, epoch, records, time.perf_counter() - started)
            is_current = self._writer.put(batch)
            if first and is_current:
                self._begun(deployment, stored)
        except Exception as error:
            self._drop_stream()
            with self._state:
                if self._epoch == epoch:
                    self._round = None
            self._failed(error, epoch)
            return
        if not is_current:
            self._drop_stream()

    def _drop_stream(self) -> None:
        if self._stream is not None:
            with suppress(AssayError):
                self._stream.close()
            self._stream = None


def _batch(stored: StoredRound, epoch: int, records: list[Record], seconds: float) -> ComputedBatch:
    valid = [
        not record.has_distance or is_valid(record.distance, stored.r_target) for record in records
    ]
    broken = [
        record.nonce
        for record in records
        if record.has_distance and not is_distance(record.distance)
    ]
    if broken:
        raise BadWeights(
            f"the engine returned NaN or an out-of-range distance for nonce {broken[0]}",
            wanted="finite distances in [0, 2]",
            do="check the checkpoint and the device, then start the phase again",
        )
    return ComputedBatch(
        epoch, stored.id, records, valid, records[-1].nonce + stored.round.node_count, seconds
    )


class Writer(LoopThread):
    """A thread that commits batches in order, several in one transaction where they have piled up.

    ``committed`` receives the batches of every transaction and its seconds, ``failed`` what waiting
    does not cure.
    """

    def __init__(
        self,
        rounds: Rounds,
        outbox: Outbox,
        settings: ServiceSettings,
        *,
        committed: Callable[[list[ComputedBatch], float], None],
        failed: Callable[[Exception], None],
    ) -> None:
        super().__init__("assay-writer")
        self._rounds = rounds
        self._outbox = outbox
        self._settings = settings
        self._committed = committed
        self._failed = failed
        self._queue: list[ComputedBatch] = []
        self._epoch = 0
        self._busy = False
        self._has_room = False
        self.paused: Paused | None = None

    def put(self, batch: ComputedBatch) -> bool:
        """Queue a batch, waiting for room; False if its epoch has ended."""
        with self._state:
            self._state.wait_for(
                lambda: (
                    len(self._queue) < QUEUE
                    or batch.epoch != self._epoch
                    or self._closed
                    or self._has_room
                )
            )
            if batch.epoch != self._epoch or self._closed:
                return False
            self._queue.append(batch)
            self._state.notify_all()
            return True

    def make_room(self) -> None:
        """Take every batch at once from now on: no more are computed than the one that runs."""
        self._has_room = True
        self._notify()

    def begin(self, epoch: int, timeout: float = 5.0) -> None:
        """End the current epoch and begin another.

        Queued batches are still written, however many callbacks are undelivered. Those that cannot
        be written within ``timeout`` seconds are dropped: they were never acknowledged, and the
        round continues before them.
        """
        with self._state:
            self._epoch = epoch
            self._state.notify_all()
            written = self._state.wait_for(lambda: not self._queue and not self._busy, timeout)
            if not written:
                self._queue.clear()
                self._state.notify_all()
                self._state.wait_for(lambda: not self._busy)

    @override
    def close(self, timeout: float | None = None) -> bool:
        self.begin(self._epoch + 1)  # what is queued is written
        return super().close(timeout)

    @override
    def _run(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                self._busy = True
                batches = self._queue.copy()
            error = self._write(batches)
            with self._state:
                self._busy = False
            self._notify()
            if error is not None:
                # Only now: the receiver of the error may wait for this thread to be idle.
                self._failed(error)

    def _write(self, batches: list[ComputedBatch]) -> Exception | None:
        """Commit what is queued, or wait a moment if that is not possible now; return what waiting
        does not cure.
        """
        try:
            is_current = batches[0].epoch == self._epoch
            owed = self._outbox.owed(batches[0].round_id, "generated") if is_current else 0
            if owed >= self._settings.max_pending:
                self._pause("callbacks", CALLBACK_PAUSE)
                return None
            started = time.perf_counter()
            self._rounds.commit(
                batches,
                interval=self._settings.callback_interval,
                most=self._settings.callback_nonces,
            )
        except StorageError:
            self._pause("storage", STORAGE_PAUSE)
            return None
        except Exception as error:  # two results for one nonce, or a round that was deleted
            with self._state:
                # What was computed after these would leave a gap.
                self._queue.clear()
                self._epoch = ENDED
            return error
        with self._state:
            del self._queue[: len(batches)]
            self._state.notify_all()
        self._pause(None)
        self._committed(batches, time.perf_counter() - started)
        return None

    def _pause(self, reason: Paused | None, seconds: float = 0.0) -> None:
        if reason != self.paused:
            self.paused = reason
            log.warning("generation waits", reason=reason) if reason else log.info("continues")
        if seconds:
            with self._state:
                epoch = self._epoch
                self._state.wait_for(
                    lambda: self._closed or self._epoch != epoch or not self._queue, seconds
                )
