"""The controller: the state of the service, and everything that changes it.

Knows the engine only through :class:`assay.poc.Engine`, and nothing of HTTP beyond the statuses of refusals.
Calls block for as long as a transaction takes, so an event loop makes them in threads; :attr:`Controller.status`
and the numbers behind it are read without waiting for anything.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import structlog

from assay.errors import AssayError, StorageError, UsageError
from assay.poc._pipelines import get_pipeline
from assay.poc._prover import compute
from assay.poc.engines import Engine
from assay.poc.service._bodies import ArtifactInit, GenerateRequest, InitRequest, Params, ValidateRequest
from assay.poc.service._database import Database
from assay.poc.service._deployment import Deployment
from assay.poc.service._guard import check_url
from assay.poc.service._jobs import PIPELINE, Jobs, job_round
from assay.poc.service._judge import Judge
from assay.poc.service._metrics import Metrics
from assay.poc.service._outbox import Outbox
from assay.poc.service._progress import Progress
from assay.poc.service._refusals import Refusal
from assay.poc.service._rounds import Batch, Rounds, StoredRound
from assay.poc.service._settings import Settings
from assay.poc.service._states import State, after
from assay.poc.service._worker import Worker
from assay.poc.service._writer import Writer

__all__ = ["Controller"]

log = structlog.get_logger("assay.controller")

PRESETS = {(False, True): "poc-2.0", (True, False): "layer-normalize"}
"""Preset by (use_layer_hooks, use_sign_flips)."""

Result = dict[str, Any]


class Controller:
    """Runs rounds, validations and artifact jobs on one engine, and keeps them on disk.

    Args:
        load: loads the model and returns its :class:`Deployment`; runs in the engine's thread.
        settings: bounds, keys, directories.
    """

    def __init__(self, load: Callable[[], Deployment], settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.started_at = time.time()
        self.closing = threading.Event()
        self.on_commit: Callable[[], None] = lambda: None
        """Called from the writer's thread when callbacks may be due."""
        self.deployment: Deployment | None = None
        self.error: str | None = None
        self.ended = True
        self._opened = False
        self._load = load
        self._lock = threading.RLock()
        self._epoch = 0
        self._engines: dict[tuple[int, int], Engine] = {}
        self._unsaved = False

    def open(self) -> None:
        """Open the database and return to the state in which the service was left. A second call does nothing.

        Raises:
            StorageError: the data directory is in use or cannot be written.
        """
        if self._opened:
            return
        self._opened = True
        self.database = Database(self.settings.data_dir)
        self.outbox = Outbox(self.database)
        self.rounds = Rounds(self.database, self.outbox)
        self.judge = Judge(self.database, self.outbox, self.settings)
        self.jobs = Jobs(self.database, self.outbox, self.settings)
        self.outbox.retry_now()
        self.state, stored = self.rounds.current()
        self.progress = Progress(stored, self.rounds) if stored else None
        self.writer = Writer(
            self.rounds,
            self.outbox,
            self.settings,
            committed=self._committed,
            changed=self._paused,
            failed=self._engine_failed,
        )
        self._worker = Worker(
            self._load,
            put=self.writer.put,
            background=self.jobs.step,
            ready=self._ready,
            failed=self._engine_failed,
        )

    def start(self) -> None:
        """Open what is not open, and load the model in the engine's thread.

        Raises:
            StorageError: the data directory is in use or cannot be written.
        """
        self.open()
        self.writer.start()
        self._worker.start()

    def close(self) -> None:
        """Finish the running batch, write what is computed, and close.

        :attr:`ended` is False afterwards where the batch did not end in time.
        """
        self.closing.set()
        with self._lock:
            self._worker.generate(None, self._epoch)
        self.ended = self._worker.close(self.settings.drain)
        self.writer.close()
        self.database.close()

    # Calls

    def init(self, request: InitRequest | ArtifactInit, then: State) -> None:
        """Begin or continue a round; ``then`` is the state of the call: IDLE, GENERATING or VALIDATING.

        Raises:
            Refusal: 409, 422 or 503.
            StorageError: the database cannot be written.
        """
        call = "init" if then is State.IDLE else f"init/{'generate' if then is State.GENERATING else 'validate'}"
        after(call, self.state, has_round=self.progress is not None)
        deployment = self.ready()
        values = self._round_values(request, deployment, needs_share=then is State.GENERATING)
        get_engine_shape(self.settings, values["batch_size"], values["seq_len"], deployment)
        self._engine(values["seq_len"], values["batch_size"])
        with self._lock:
            state = after(call, self.state, has_round=self.progress is not None)
            stored = self.rounds.enter(state, values)
            self._move(state, stored)

    def phase(self, call: str) -> None:
        """Change to ``phase/generate`` or ``phase/validate`` with the round that is initialised.

        Raises:
            Refusal: 409 or 503.
            StorageError: the database cannot be written.
        """
        with self._lock:
            state = after(call, self.state, has_round=self.progress is not None)
            self.ready()
            if state is self.state and self.error is None:
                return
            self._check_same_model()
            self.rounds.enter(state)
            self._move(state)

    def stop(self) -> None:
        """Stop generating and validating. Works with a full disk too; the state is then written later."""
        with self._lock:
            state = after("stop", self.state, has_round=self.progress is not None)
            self._persist(state)
            self._move(state)

    def validate(self, request: ValidateRequest) -> "Future[Result]":
        """Recompute and judge distances of the round's block; the future has the response.

        Raises:
            Refusal: 409 another state or block, 422 malformed, 429 too many wait, 503 not ready.
        """
        with self._lock:
            after("validate", self.state, has_round=self.progress is not None)
            self.ready()
            assert self.progress is not None
            stored, epoch = self.progress.stored, self._epoch
        self._check_validation(request, stored)
        future: Future[Result] = Future()

        def task(deployment: Deployment) -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if epoch != self._epoch:
                    after("validate", self.state, has_round=True)
                future.set_result(self._validate(request, stored, deployment))
            except BaseException as error:
                future.set_exception(error)

        if not self._worker.submit(task, self.settings.max_waiting):
            raise Refusal(
                429,
                f"{self.settings.max_waiting} validations wait for the engine",
                wanted="fewer at once",
                do="send it again later",
                retry_after=5,
            )
        return future

    def submit(self, request: GenerateRequest) -> Result:
        """Queue an artifact job.

        Raises:
            Refusal: 400, 409, 422, 429 or 503.
        """
        deployment = self.ready()
        self._check_params(request.params, deployment)
        self._check_url(request.url)
        get_engine_shape(self.settings, request.batch_size, request.params.seq_len, deployment)
        job_round(request, deployment.reference).check_nonces(sorted(self._limited(request.nonces)))
        if request.validation is not None:
            sent = [artifact.nonce for artifact in request.validation.artifacts]
            if sorted(sent) != sorted(request.nonces):
                raise Refusal(
                    400, "artifacts of other nonces than asked", wanted="one per nonce", do="send both for the same"
                )
        queued = self.jobs.submit(request)
        self._worker.wake()
        return queued

    # Reading

    def ready(self) -> Deployment:
        """Return the deployment.

        Raises:
            Refusal: 503, the model is not loaded.
        """
        if self.deployment is None:
            failed = self.error is not None
            raise Refusal(
                503,
                f"the model could not be loaded: {self.error}" if failed else "the model is being loaded",
                wanted="a loaded model",
                do="see the log, then start the service again" if failed else "ask /ready, then send it again",
                retry_after=None if failed else 5,
            )
        return self.deployment

    @property
    def paused(self) -> str | None:
        """Why a generating service does not generate: ``storage``, ``callbacks``, or None."""
        return self.writer.paused if self.state is State.GENERATING else None

    @property
    def status(self) -> Result:
        """The body of ``/status``: the fields of both published forms, and ours."""
        progress, state = self.progress, self.state
        stored = progress.stored if progress else None
        recent = list(progress.recent) if progress else []
        artifacts = progress is not None and progress.publishes_vectors
        return {
            "state": str(state),
            "valid_nonces": [nonce for nonce, _ in recent],
            "valid_distances": [] if artifacts else [distance for _, distance in recent],
            "total_checked": progress.checked if progress else 0,
            "total_valid": progress.valid if progress else 0,
            "elapsed_seconds": progress.seconds if progress else 0.0,
            "rate_per_second": progress.rate if progress else 0.0,
            "r_target": stored.r_target if stored else None,
            "status": str(state),
            "config": _config(stored),
            "stats": {"total_processed": progress.checked, "nonces_per_second": progress.rate} if progress else None,
            "ready": self.deployment is not None,
            "paused": self.paused,
            "error": self.error,
        }

    def status_after(self, after: int, limit: int) -> Result:
        """Return :attr:`status` with the first ``limit`` valid nonces above ``after``, from the database."""
        status, progress = self.status, self.progress
        found = self.rounds.recent_valid(progress.stored.id, after=after, limit=limit) if progress else []
        vectors = progress is not None and progress.publishes_vectors
        status["valid_nonces"] = [nonce for nonce, _ in found]
        status["valid_distances"] = [] if vectors else [distance for _, distance in found]
        return status

    # Inside

    def _move(self, state: State, stored: StoredRound | None = None) -> None:
        """Take the state in memory; what runs ends between two batches."""
        self.error = None
        self._epoch += 1
        self._worker.generate(None, self._epoch)
        self.state = state
        self.writer.begin(self._epoch)
        if stored is not None and (self.progress is None or self.progress.stored.id != stored.id):
            self.progress = self._progress(stored)
        elif stored is not None and self.progress is not None:
            self.progress.stored = stored
        if state is State.GENERATING:
            self._generate()
        elif self.deployment is not None and self.jobs.has_open():
            self._worker.wake()
        log.info("state", state=str(state), round=self.progress.stored.id if self.progress else None)

    def _generate(self) -> None:
        """Generate from what is on disk."""
        _, stored = self.rounds.current()
        if stored is not None and self.progress is not None:
            self.progress.stored = stored
            self._worker.generate(stored, self._epoch)

    def _progress(self, stored: StoredRound) -> Progress:
        if self.deployment is None:
            return Progress(stored, self.rounds)
        engine = self._engine(stored.seq_len, stored.batch_size)
        return Progress(stored, self.rounds, hidden_size=engine.hidden_size, vocab_size=engine.vocab_size)

    def _engine(self, seq_len: int, batch_size: int) -> Engine:
        """Return the engine of a shape; an error of assay says why there is none."""
        deployment = self.ready()
        key = (seq_len, batch_size)
        if key not in self._engines:
            self._engines = {key: deployment.engine(*key)}
        return self._engines[key]

    def _ready(self, deployment: Deployment) -> None:
        with self._lock:
            self.deployment = deployment
            log.info("model loaded", model=deployment.reference, dtype=deployment.dtype)
            if self.progress is None:
                return
            try:
                if self.state in (State.GENERATING, State.VALIDATING):
                    self._check_same_model()
                    self.progress = self._progress(self.progress.stored)
            except AssayError as error:
                self._fail(error)
                return
            if self.state is State.GENERATING:
                self._generate()
            elif self.jobs.has_open():
                self._worker.wake()

    def _check_same_model(self) -> None:
        assert self.progress is not None
        deployment, stored = self.ready(), self.progress.stored
        ours, theirs = (deployment.digest, deployment.weights), (stored.digest, stored.weights)
        if ours != theirs:
            raise Refusal(
                409,
                f"a round of {stored.reference} ({stored.digest[:12]})",
                wanted=f"a round of {deployment.reference} ({deployment.digest[:12]}), which runs now",
                do="start the service with that model, or begin another round",
                fields={"state": str(self.state)},
            )

    def _engine_failed(self, error: Exception) -> None:
        with self._lock:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        state = after("engine failure", self.state, has_round=self.progress is not None)
        self.metrics.failures.inc()
        self._epoch += 1
        self._worker.generate(None, self._epoch)
        self.state = state
        self.error = error.seen if isinstance(error, AssayError) else f"{type(error).__name__}: {error}"
        log.error("engine failure", error=self.error, state=str(state))
        self._persist(state)

    def _persist(self, state: State) -> None:
        try:
            self.rounds.enter(state)
            self._unsaved = False
        except StorageError as error:
            self._unsaved = True
            log.warning("state not written", reason=error.seen)

    def save_if_needed(self) -> None:
        """Write a state that could not be written before. Called from time to time."""
        with self._lock:
            if self._unsaved:
                self._persist(self.state)

    def _committed(self, batches: list[Batch], seconds: float) -> None:
        self.metrics.commit_seconds.observe(seconds)
        progress = self.progress
        for batch in batches:
            self.metrics.batch_seconds.observe(batch.seconds)
            self.metrics.nonces.inc(len(batch.records))
            self.metrics.valid.inc(sum(batch.valid))
            if progress is not None and progress.stored.id == batch.round_id:
                progress.add(batch)
        self.on_commit()

    def _paused(self) -> None:
        log.warning("generation waits", reason=self.writer.paused) if self.writer.paused else log.info("continues")

    def _validate(self, request: ValidateRequest, stored: StoredRound, deployment: Deployment) -> Result:
        started = time.perf_counter()
        engine = self._engine(stored.seq_len, stored.batch_size)
        header = stored.header(engine.fingerprint)
        computed = [r.distance for batch in compute(header, engine, request.nonces) for r in batch]
        if not all(0 <= value <= 2 + 1e-6 for value in computed):
            raise Refusal(503, "the engine returned no finite distance", wanted="distances", do="check the device")
        verdict = self.judge.judge(stored, deployment.dtype, request.public_key, request.nonces, request.dist, computed)
        self.metrics.validation_seconds.observe(time.perf_counter() - started)
        self.metrics.verdicts.labels(verdict["residual_test"]["verdict"]).inc()
        self.on_commit()
        return {"status": "OK", **verdict}

    def _check_validation(self, request: ValidateRequest, stored: StoredRound) -> None:
        other = [name for name in ("block_hash", "block_height") if getattr(request, name) != getattr(stored, name)]
        if other:
            raise Refusal(
                409,
                f"a proof with another {' and '.join(other)} than the round's",
                wanted=f"block_hash {stored.block_hash!r} at height {stored.block_height}",
                do="send /init/validate for that block first",
                fields={"state": str(self.state), "fields": other},
            )
        if get_pipeline(stored.preset).output != "distance":
            raise Refusal(
                409,
                "distances for a round of vectors",
                wanted="a round that was begun with r_target",
                do="check vectors with /generate and its field validation",
                fields={"state": str(self.state)},
            )
        if len(request.nonces) != len(request.dist) or len(set(self._limited(request.nonces))) != len(request.nonces):
            raise Refusal(
                422,
                f"{len(request.nonces)} nonces, {len(set(request.nonces))} different, {len(request.dist)} distances",
                wanted="one distance per nonce, every nonce once",
                do="send both lists in the same order",
            )

    def _limited(self, nonces: Sequence[int]) -> Sequence[int]:
        if len(nonces) > self.settings.max_nonces:
            raise Refusal(
                422, f"{len(nonces)} nonces", wanted=f"at most {self.settings.max_nonces} in one request", do="split it"
            )
        return nonces

    def _check_url(self, url: str | None) -> None:
        if url is not None:
            check_url(url, allow_private=self.settings.allow_private_callbacks)

    def _check_params(self, params: Params, deployment: Deployment) -> None:
        requested = params.model_dump()
        deployed = {"model": deployment.reference, "seq_len": self.settings.seq_len, "k_dim": PIPELINE.vector_size}
        other = sorted(name for name, value in deployed.items() if requested[name] != value)
        if other:
            raise Refusal(
                409,
                "params mismatch: " + ", ".join(other),
                wanted=", ".join(f"{name} {deployed[name]}" for name in other),
                do="ask for what is deployed",
                fields={"error": "params mismatch", "requested": requested, "deployed": deployed, "fields": other},
            )

    def _round_values(
        self, request: InitRequest | ArtifactInit, deployment: Deployment, *, needs_share: bool
    ) -> dict[str, Any]:
        """Return the columns of ``rounds`` that a request asks for."""
        values = {
            name: getattr(request, name)
            for name in (
                "block_hash",
                "block_height",
                "public_key",
                "node_id",
                "node_count",
                "group_id",
                "n_groups",
                "batch_size",
            )
        }
        if isinstance(request, ArtifactInit):
            self._check_params(request.params, deployment)
            url, seq_len, preset = request.url, request.params.seq_len, PIPELINE.name
            values |= {"r_target": 2.0, "fraud_threshold": 0.01}
        else:
            url, seq_len, preset = request.callback_url, request.seq_len, _preset(request)
            values |= {"r_target": request.r_target, "fraud_threshold": request.fraud_threshold}
            values |= _share(request, needed=needs_share)
        self._check_url(url)
        values |= {"callback_url": url, "seq_len": seq_len, "preset": preset}
        values |= {"strength": 256 if request.poc_stronger_rng else 32}
        return values | {name: getattr(deployment, name) for name in ("reference", "digest", "weights")}


def get_engine_shape(settings: Settings, batch_size: int, seq_len: int, deployment: Deployment) -> None:
    """Refuse shapes over the limits.

    Raises:
        Refusal: 422.
    """
    if batch_size * seq_len > settings.max_positions or seq_len > deployment.max_positions:
        raise Refusal(
            422,
            f"batch_size {batch_size} × seq_len {seq_len}",
            wanted=f"at most {settings.max_positions} positions a batch, {deployment.max_positions} a sequence",
            do="lower batch_size or seq_len",
        )


def _share(request: InitRequest, *, needed: bool) -> dict[str, int]:
    """Return node_id and node_count; -1 for both, the published default, is the only node of a round."""
    unset = request.node_id == -1 or request.node_count == -1
    if unset and needed:
        raise Refusal(
            400, "Node ID and node count must be set", wanted="node_id and node_count", do="send 0 and 1 for one node"
        )
    return {"node_id": 0, "node_count": 1} if unset else {"node_id": request.node_id, "node_count": request.node_count}


def _preset(request: InitRequest) -> str:
    preset = PRESETS.get((request.use_layer_hooks, request.use_sign_flips))
    if preset is None:
        raise UsageError(
            f"use_layer_hooks {request.use_layer_hooks} with use_sign_flips {request.use_sign_flips}",
            wanted="exactly one of the two",
            do="leave both out: sign flips are the recommendation",
        )
    return preset


def _config(stored: StoredRound | None) -> Result | None:
    if stored is None:
        return None
    names = ("block_hash", "block_height", "public_key", "node_id", "node_count", "group_id", "n_groups", "seq_len")
    return {name: getattr(stored, name) for name in names} | {"k_dim": get_pipeline(stored.preset).vector_size}
