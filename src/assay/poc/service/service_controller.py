"""The controller: the state of the service, and everything that changes it.

It knows the engine only through :class:`assay.poc.Engine`, and nothing of HTTP beyond the statuses
of refusals. Its calls block for as long as a transaction takes, so an event loop makes them through
:meth:`Controller.call`; the attributes that a reader needs (``state``, ``progress``, ``error``) are
read without waiting.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import structlog
from typing_extensions import override

from assay.errors import AssayError, EngineEnded, StorageError, UsageError, reason_of
from assay.files.jsonl import JsonObject
from assay.poc.engines.base import check_supported
from assay.poc.net.deployment import Deployment
from assay.poc.net.refusals import Refusal
from assay.poc.net.runtime import Runtime
from assay.poc.net.shares import Shares
from assay.poc.protocol.blocks import has_block_factor
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.service import request_bodies as requests
from assay.poc.service import request_checks as checks
from assay.poc.service.database import open_database
from assay.poc.service.distance_judge import HonestNoise, Judge, check_calibration
from assay.poc.service.jobs import Jobs
from assay.poc.service.outbox import Outbox
from assay.poc.service.progress import EXPECTED, Progress
from assay.poc.service.receipt_keeper import ReceiptKeeper
from assay.poc.service.round_worker import ShareDone, Worker, Writer
from assay.poc.service.rounds import ComputedBatch, Rounds, StoredRound
from assay.poc.service.service_metrics import Metrics
from assay.poc.service.service_settings import ServiceSettings
from assay.poc.service.states import State, after

log = structlog.get_logger("assay.controller")

PRUNE_EVERY = 600.0
SCHEMA = "assay.poc.snapshot/1"


class Controller(Runtime):
    """Runs rounds, validations and artifact jobs on one engine, and keeps them on disk.

    It begins in the state in which the service was left. ``load`` is called in the engine's thread.

    Raises:
        StorageError: The data directory is in use, cannot be written, or holds a damaged database.
        UsageError: The ledger was begun at other error rates, or the round under pins that are not
            given.
        Refusal: The callback URL of receipts can never be called.
        DataError: A calibration that the pins name cannot be read, or is another one than was
            pinned.
    """

    metrics: Metrics
    worker: Worker

    def __init__(self, load: Callable[[], Deployment], settings: ServiceSettings) -> None:
        super().__init__(settings, Metrics())
        self.settings = settings
        self.error: str | None = None
        self._pruned_at = 0.0
        self._lock = threading.RLock()
        self._epoch = 0
        self._unsaved = False
        # Whether a batch was written since the start.
        self._computed = False
        self._validations = Shares(settings.max_waiting)  # that wait for the engine
        self._noise = noise = HonestNoise(settings)
        # An error leaves no file open, and no lock on the directory.
        with ExitStack() as opened:
            self.database = open_database(settings.data_dir)
            opened.callback(self.database.close)
            self.outbox = Outbox(self.database)
            self.rounds = Rounds(self.database, self.outbox)
            if settings.ledger is not None and not settings.ledger.exists():
                log.info("new ledger", path=str(settings.ledger))
            self.judge = Judge(self.database, self.outbox, settings, noise)
            opened.callback(self.judge.close)
            self.jobs = Jobs(self.database, self.outbox, settings, noise, self.closing)
            self.receipts = ReceiptKeeper(self.database, self.outbox, settings, self.metrics)
            self.outbox.retry_now()
            self.state, stored = self.rounds.current()
            # Whether the next start generates on.
            self._resumes = settings.resume != "never"
            self.state = self._left_in(self.state, resumes=self._resumes)
            if stored and stored.under_pins and settings.pins is None:
                raise UsageError(
                    "a round that was begun under pins, and no --pins",
                    wanted="the pins that the network agreed on",
                    do="pass --pins, or another --data-dir",
                )
            self.progress = Progress(stored, self.rounds) if stored else None
            self._files = opened.pop_all()
        self.writer = Writer(
            self.rounds,
            self.outbox,
            settings,
            committed=self._committed,
            failed=self._engine_failed,
        )
        self.writers = (self.writer, self.receipts)
        self.worker = Worker(
            partial(self.load_model, load),
            self.writer,
            self.jobs,
            begun=self._measure_block,
            failed=self._engine_failed,
        )

    def init(self, request: requests.InitRequest | requests.ArtifactInit, call: str) -> None:
        """Begin or continue a round, by the call ``init``, ``init/generate`` or
        ``init/validate``.
        """
        generates = self._after(call) is State.GENERATING
        deployment = self.ready()
        values = checks.round_values(request, deployment, self.settings, needs_share=generates)
        pipeline = get_pipeline(values.preset)
        if pipeline.number_formats and deployment.dtype not in pipeline.number_formats:
            log.warning(
                "validators refuse this number format", preset=values.preset, dtype=deployment.dtype
            )
        engine = deployment.engine(values.seq_len, values.batch_size)
        checks.check_build(engine.fingerprint, deployment, self.settings)
        check_supported(engine, pipeline)
        with self._lock:
            state = self._after(call)
            begun_by_chain = self.settings.resume == "auto" and request.chain
            resumes = self.settings.resume != "never" and not begun_by_chain
            left_in = self._left_in(state, resumes=resumes)
            stored = self.rounds.enter(left_in, values, reshare=request.chain)
            self._resumes = resumes
            self._move(state, stored)

    def phase(self, call: str) -> None:
        """Change to ``phase/generate`` or ``phase/validate`` with the round that is initialised."""
        with self._lock:
            state = self._after(call)
            self.ready()
            if state is not self.state or self.error is not None:
                self._check_same_model(state)
                self.rounds.enter(self._left_in(state, resumes=self._resumes))
                self._move(state)

    def stop(self, *, cancel_jobs: bool = False) -> None:
        """Stop generating and validating, and on request cancel jobs; works with a full disk."""
        with self._lock:
            state = self._after("stop")
            self._persist(state)
            if cancel_jobs:
                try:
                    self.jobs.cancel_open()
                except StorageError as error:
                    log.warning("jobs not cancelled", reason=error.seen)
            self._move(state)

    def validate(
        self, request: requests.ValidateRequest, client: str | None = None
    ) -> "Future[JsonObject]":
        """Recompute and judge distances of the round's block; the future has the response."""
        with self._lock:
            self._after("validate")
            stored = self._check_same_model(self.state)
            epoch = self._epoch
        checks.check_validation(request, stored, self.settings)
        owed = self.outbox.owed(stored.id, "validated")
        if owed >= self.settings.max_pending:
            raise Refusal(
                429,
                f"{owed} verdicts of this round are undelivered",
                wanted=f"fewer than {self.settings.max_pending} (--max-pending)",
                do="repair the receiver at the callback URL of the round, and send it again",
                retry_after=10,
            )
        future = Future[JsonObject]()
        place = ExitStack()

        def task(deployment: Deployment) -> None:
            with self._lock:
                place.close()
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(self._validate(request, stored, deployment, epoch))
            except (
                Exception
            ) as error:  # an engine may raise any error, and the request must be answered
                if not isinstance(error, AssayError):
                    log.exception("validation failed")
                    error = Refusal(
                        503,
                        reason_of(error),
                        wanted="a working engine",
                        do="see the log of the service",
                    )
                future.set_exception(error)

        with self._lock:
            place.enter_context(
                self._validations.held(
                    client, "validations", do="send it again later", retry_after=5
                )
            )
        self.worker.submit(task)
        return future

    def submit(self, request: requests.GenerateRequest, client: str | None = None) -> JsonObject:
        """Queue an artifact job of a client."""
        deployment = self.ready()
        checks.check_job(request, deployment, self.settings)
        queued = self.jobs.submit(request, client, digest=deployment.digest)
        self.worker.wake()
        return queued

    async def run_job(
        self, request: requests.GenerateRequest, client: str | None
    ) -> tuple[JsonObject, bool]:
        """Queue a job and wait if asked; return its state and whether the wait timed out."""
        queued = await self.call(self.submit, request, client)
        if not request.wait:
            return queued, False
        future = await self.call(self.jobs.watch, queued["request_id"])
        try:
            async with asyncio.timeout(self.settings.wait):
                return await asyncio.wrap_future(future), False
        except TimeoutError:
            return await self.call(self.jobs.state, queued["request_id"]), True

    def ready(self) -> Deployment:
        """Return the deployment, or refuse with 503 before one is loaded."""
        if self.deployment is not None:
            return self.deployment
        if self.loaded.done():
            raise Refusal(
                503,
                f"the model could not be loaded: {self.error}",
                wanted="a loaded model",
                do="see the log, then start the service again",
            )
        raise Refusal(
            503,
            "the model is being loaded",
            wanted="a loaded model",
            do="ask /ready, then send it again",
            retry_after=5,
        )

    @override
    def check_ready(self) -> None:
        self.ready()
        if self.error is not None:
            raise Refusal(
                503, self.error, wanted="no failure", do="see the log, then start the phase again"
            )

    @property
    def paused(self) -> str | None:
        """Why a generating service does not generate: ``storage``, ``callbacks``, or None."""
        return self.writer.paused if self.state is State.GENERATING else None

    @staticmethod
    def _left_in(state: State, *, resumes: bool) -> State:
        """Return the state in which the next start finds the service that is in this one."""
        return State.STOPPED if state is State.GENERATING and not resumes else state

    def _after(self, call: str) -> State:
        return after(call, self.state, has_round=self.progress is not None)

    def _move(self, state: State, stored: StoredRound | None = None) -> None:
        """Take the state in memory; what runs ends between two batches."""
        progress = self.progress
        if stored is not None and (progress is None or progress.is_of_another(stored)):
            progress = self._progress(stored)
        self.error = None
        self._end_epoch()
        self.state = state
        if stored is not None and progress is not None:
            progress.stored = stored
            self.progress = progress
        self._work()
        now = self.progress.stored if self.progress else None
        about = (
            {"round": now.id, "block": now.block_hash, "key": now.public_key}
            if now
            else {"round": None}
        )
        log.info("state", state=str(state), **about)

    def _end_epoch(self) -> None:
        """Stop generating, and write what is computed: the next round begins after it."""
        self._epoch += 1
        self.worker.generate(None, self._epoch)
        self.writer.begin(self._epoch)

    def _work(self) -> None:
        """Generate from the first nonce that is not on disk, or do the jobs that wait."""
        if self.state is State.GENERATING and self.progress is not None:
            stored = replace(self.progress.stored, next_nonce=self.progress.next_nonce)
            self.worker.generate(stored, self._epoch)
        elif self.deployment is not None and self.jobs.has_open():
            self.worker.wake()

    def _progress(self, stored: StoredRound) -> Progress:
        if self.deployment is None:
            return Progress(stored, self.rounds)
        engine = self.deployment.engine(stored.seq_len, stored.batch_size)
        return Progress(
            stored,
            self.rounds,
            hidden_size=engine.hidden_size,
            vocab_size=engine.vocab_size,
            effective_dimension=self._noise.effective_dimension(stored.digest, stored.preset),
        )

    def _measure_block(self, deployment: Deployment, stored: StoredRound) -> None:
        """Measure once how wide the distances of a round's block are, where no calibration says
        it.
        """
        progress = self.progress
        if (
            progress is None
            or progress.stored.id != stored.id
            or progress.law is not None
            or not has_block_factor(get_pipeline(stored.preset))
        ):
            return
        log.info(
            "reading states of the model for the law of the block; a calibration would say it",
            round=stored.id,
        )
        factor = deployment.block_factor(stored.round, stored.batch_size)
        if factor is not None:
            progress.factor = factor
            log.info(
                "block",
                round=stored.id,
                factor=round(factor.value, 4),
                error=round(factor.error, 4),
            )

    @override
    def _check_model(self, deployment: Deployment) -> None:
        check_calibration(self.settings.calibration, deployment)
        checks.check_deployed(deployment, self.settings)

    @override
    def _loading_failed(self, error: Exception) -> None:
        # The state stays: a service that is started again with the right model continues its round.
        super()._loading_failed(error)
        self.metrics.failures.inc()
        self.error = reason_of(error)

    @override
    def _begin(self, deployment: Deployment) -> None:
        with self._lock:
            self.deployment = deployment
            try:
                if self.progress is not None and self.state in (State.GENERATING, State.VALIDATING):
                    self._check_same_model(self.state)
                    self.progress = self._progress(self.progress.stored)
            except AssayError as error:
                self._engine_failed(error)
            self._work()

    def _check_same_model(self, state: State) -> StoredRound:
        """Return the round, or refuse to work on it with another model or under other pins than it
        was begun with.
        """
        assert self.progress is not None
        stored = self.progress.stored
        deployment = self.ready()
        if (deployment.digest, deployment.weights) != (stored.digest, stored.weights):
            raise Refusal(
                409,
                f"a round of {stored.reference} ({stored.digest[:12]})",
                wanted=f"a round of {deployment.reference} ({deployment.digest[:12]}), which runs "
                "now",
                do="start the service with that model, or begin another round",
                fields={"state": str(self.state)},
            )
        checks.check_round(stored.round, self.settings, share=state is State.GENERATING)
        return stored

    def _engine_failed(self, error: Exception, epoch: int | None = None) -> None:
        with self._lock:
            if epoch not in (None, self._epoch):  # another call ended that round first
                return
            if self.closing.is_set():
                # An engine that is torn down beneath its batch fails. The round must continue after
                # the next start.
                log.info(
                    "a batch ended with the service and will be computed again",
                    error=reason_of(error),
                )
                return
            # A server whose engine died ends, and its next start continues, as after SIGKILL. Not
            # if the engine died before its first batch: a round that kills engines would end every
            # start, and what else they serve.
            continues = isinstance(error, EngineEnded) and self._computed
            state = self.state if continues else self._after("engine failure")
            if not isinstance(error, ShareDone):
                self.metrics.failures.inc()
            self._end_epoch()
            self.state = state
            self.error = reason_of(error)
            log.error(
                "the engine ended, and the next start continues the round"
                if continues
                else "the round ended",
                error=self.error,
                state=str(state),
            )
            self._persist(state)
            if self.jobs.has_open():
                self.worker.wake()

    def _persist(self, state: State) -> None:
        try:
            self.rounds.enter(self._left_in(state, resumes=self._resumes))
            self._unsaved = False
        except StorageError as error:
            self._unsaved = True
            log.warning("state not written", reason=error.seen)

    @override
    def tend(self) -> None:
        with self._lock:
            # A state that could not be written before.
            if self._unsaved:
                self._persist(self.state)
        if time.monotonic() - self._pruned_at > PRUNE_EVERY:
            self.rounds.prune(self.settings.keep_rounds)
            self.outbox.prune(self.settings.keep_rounds)
            self.jobs.prune()
            self._pruned_at = time.monotonic()

    @override
    def snapshot(self) -> JsonObject:
        progress = self.progress
        deployment = self.deployment
        return {
            **self.about(SCHEMA),
            "state": str(self.state),
            "ready": deployment is not None,
            "paused": self.paused,
            "error": self.error,
            "model": deployment
            and {
                "reference": deployment.reference,
                "digest": deployment.digest,
                "dtype": deployment.dtype,
            },
            "round": progress and progress.stored.public(),
            "checked": progress.checked if progress else 0,
            "valid": progress.valid if progress else 0,
            "next_nonce": progress.next_nonce if progress else None,
            "seconds": progress.seconds if progress else 0.0,
            "nonces_per_second": progress.current_rate
            if progress and str(self.state) == "GENERATING"
            else 0.0,
            **(progress.expectation() if progress else dict.fromkeys(EXPECTED)),
            "histogram": progress.histogram() if progress else None,
            "callbacks": self.outbox.counts(),
            "jobs": self.jobs.counts(),
            "verdicts": self.judge.last(),
        }

    def _committed(self, batches: list[ComputedBatch], seconds: float) -> None:
        self.metrics.commit_seconds.observe(seconds)
        progress = self.progress
        self._computed = True
        for batch in batches:
            self.metrics.batch_seconds.observe(batch.seconds)
            self.metrics.nonces.inc(len(batch.records))
            self.metrics.valid.inc(sum(batch.valid))
            if progress is not None and progress.stored.id == batch.round_id:
                progress.add(batch)
        self.outbox.notify()

    def _validate(
        self,
        request: requests.ValidateRequest,
        stored: StoredRound,
        deployment: Deployment,
        epoch: int,
    ) -> JsonObject:
        started = time.perf_counter()
        computed: list[float] = []
        # The key that is paid, not the validator's.
        round = replace(stored.round, public_key=request.public_key)
        engine = deployment.engine(stored.seq_len, stored.batch_size)
        for batch in deployment.compute(round.inputs(request.nonces), stored.batch_size):
            if epoch != self._epoch or self.closing.is_set():
                raise Refusal(
                    409,
                    f"the round changed while this validation ran, and the state is {self.state}",
                    wanted="VALIDATING until the answer",
                    do="send it again in the round that you mean",
                    fields={"state": str(self.state)},
                )
            computed.extend(record.distance for record in batch)
        verdict = self.judge.judge(stored, engine.fingerprint, request, computed)
        self.metrics.validation_seconds.observe(time.perf_counter() - started)
        word = verdict["residual_test"]["verdict"]
        self.metrics.verdicts.labels(word).inc()
        log.info(
            "validated",
            block=stored.block_hash,
            key=request.public_key,
            nonces=len(request.nonces),
            mismatches=verdict["n_invalid"],
            verdict=word,
        )
        self.outbox.notify()
        return {"status": "OK", **verdict}
