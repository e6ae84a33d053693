"""The engine's own thread: validations first, then the round, then artifact jobs, one batch at a time.

torch and the compiled streams release the interpreter while they compute, so the event loop answers meanwhile.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress

from assay.errors import AssayError, BadWeights
from assay.poc.protocol import MAX_NONCE, Record, is_distance, is_valid
from assay.poc.service.runtime._deployment import Deployment
from assay.poc.service.store import Batch, StoredRound

Records = Iterator[list[Record]]


class ShareDone(AssayError):
    """Every nonce of a node's share is computed, so that its round has ended."""


class Worker:
    """Runs everything that touches the engine.

    Args:
        load: Loads the model, or returns None, which ends the thread. It is called in the thread, so that the service
            answers meanwhile.
        put: Takes a batch of the round, and returns False when the batch is no longer wanted.
        background: Does one batch of less urgent work, and returns False when there was no such work.
        failed: Receives the error that ended the round.
    """

    def __init__(
        self,
        load: Callable[[], Deployment | None],
        *,
        put: Callable[[Batch], bool],
        background: Callable[[Deployment], bool],
        failed: Callable[[Exception], None],
    ) -> None:
        self._load, self._put, self._background, self._failed = load, put, background, failed
        self._state = threading.Condition()
        self._tasks: deque[Callable[[Deployment], None]] = deque()
        self._round: StoredRound | None = None
        self._epoch = 0
        self._stream: Records | None = None
        self._stream_epoch = -1
        self._has_background = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="assay-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def generate(self, stored: StoredRound | None, epoch: int) -> None:
        """Generate from ``stored.next_nonce`` on, or stop generating if ``stored`` is None, after the running batch."""
        with self._state:
            self._round, self._epoch = stored, epoch
            self._state.notify_all()

    def submit(self, task: Callable[[Deployment], None], limit: int) -> bool:
        """Queue a task; return False if ``limit`` tasks are waiting already."""
        with self._state:
            if len(self._tasks) >= limit:
                return False
            self._tasks.append(task)
            self._state.notify_all()
            return True

    def wake(self) -> None:
        """Say that there is background work."""
        with self._state:
            self._has_background = True
            self._state.notify_all()

    def close(self, timeout: float) -> bool:
        """End the thread after the running batch; return False if it did not end in time."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        deployment = self._load()
        while deployment is not None and self._survives(deployment):
            pass
        self._drop_stream()

    def _survives(self, deployment: Deployment) -> bool:
        """Do one piece of work. An error of any kind must not end this thread."""
        try:
            return self._turn(deployment)
        except Exception as error:
            self._failed(error)
            time.sleep(1.0)
            return True

    def _turn(self, deployment: Deployment) -> bool:
        with self._state:
            self._state.wait_for(lambda: self._closed or self._tasks or self._round or self._has_background)
            if self._closed:
                return False
            task = self._tasks.popleft() if self._tasks else None
            stored, epoch = self._round, self._epoch
            if task is None and stored is None:
                self._has_background = False
        if task is not None:
            # An open round may have hooks on the model, and the task runs another round on it.
            self._drop_stream()
            task(deployment)
        elif stored is not None:
            self._generate(deployment, stored, epoch)
        elif self._background(deployment):
            self.wake()
        return True

    def _generate(self, deployment: Deployment, stored: StoredRound, epoch: int) -> None:
        """Do one batch of the round."""
        try:
            if self._stream is None or self._stream_epoch != epoch:
                self._open_stream(deployment, stored, epoch)
            assert self._stream is not None
            started = time.perf_counter()
            records = next(self._stream, None)
            if records is None:
                raise ShareDone(
                    f"the share is done: node {stored.round.node_id} of {stored.round.node_count} has no further nonce",
                    wanted="a round that has nonces left",
                    do="begin another round",
                )
            wanted = self._put(_batch(stored, epoch, records, time.perf_counter() - started))
        except Exception as error:
            self._drop_stream()
            with self._state:
                current = self._epoch == epoch
                if current:
                    self._round = None
            if current:
                self._failed(error)
            return
        if not wanted:
            self._drop_stream()

    def _open_stream(self, deployment: Deployment, stored: StoredRound, epoch: int) -> None:
        self._drop_stream()
        share = range(stored.next_nonce, MAX_NONCE + 1, stored.round.node_count)
        self._stream = deployment.compute(stored.round, stored.batch_size, share)
        self._stream_epoch = epoch

    def _drop_stream(self) -> None:
        if self._stream is not None:
            with suppress(AssayError):
                self._stream.close()  # type: ignore[attr-defined]  # compute is a generator
            self._stream = None


def _batch(stored: StoredRound, epoch: int, records: list[Record], seconds: float) -> Batch:
    valid = [record.vector is not None or is_valid(record.distance, stored.r_target) for record in records]
    broken = [r.nonce for r in records if r.vector is None and not is_distance(r.distance)]
    if broken:
        raise BadWeights(
            f"the engine returned NaN or an out-of-range distance for nonce {broken[0]}",
            wanted="finite distances in [0, 2]",
            do="check the checkpoint and the device, then start the phase again",
        )
    return Batch(
        epoch=epoch,
        round_id=stored.id,
        records=records,
        valid=valid,
        next_nonce=records[-1].nonce + stored.round.node_count,
        seconds=seconds,
    )
