"""Artifact jobs: vectors of asked nonces, computed or checked, while no round needs the engine."""

import math
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import sqlalchemy as sa
import structlog

from assay.errors import ProofFormatError, StorageError
from assay.poc._prover import compute
from assay.poc.protocol import Header, Pipeline, Record, Round, VectorRecord, decode_vector, encode_vector, get_pipeline
from assay.poc.service._bodies import GenerateRequest
from assay.poc.service._refusals import Refusal
from assay.poc.service._settings import Settings
from assay.poc.service.runtime._deployment import Deployment
from assay.poc.service.runtime._validation import judge_vectors
from assay.poc.service.store import Database, Outbox
from assay.poc.verdict import residuals
from assay.reports import dumps, loads

log = structlog.get_logger("assay.jobs")

STORAGE_PAUSE = 1.0


class Jobs:
    """The queue of artifact jobs, on disk, and the one that runs.

    Args:
        database: Database that holds the queue.
        outbox: Outbox that takes the callbacks of finished jobs.
        settings: Bounds, and the time for which results are kept.
        closing: Event that is set when the service begins to end.
    """

    def __init__(self, database: Database, outbox: Outbox, settings: Settings, closing: threading.Event) -> None:
        self._db, self._outbox, self._settings, self._closing = database, outbox, settings, closing
        self._lock = threading.Lock()
        self._waiting: dict[str, list[Future[dict[str, Any]]]] = {}
        self._running: tuple[str, GenerateRequest, Iterator[list[Record]], list[Record]] | None = None
        jobs = database["jobs"]
        with database.write() as connection:
            connection.execute(jobs.update().where(jobs.c.status == "running").values(status="queued"))

    def submit(self, request: GenerateRequest) -> dict[str, Any]:
        """Queue a job; it is on disk when this returns.

        Raises:
            Refusal: 429, too many nonces wait already, or too many callbacks of jobs are undelivered.
        """
        jobs, job_id = self._db["jobs"], uuid.uuid4().hex
        open_jobs = jobs.c.status.in_(["queued", "running"])
        with self._db.write() as connection:
            waiting = connection.execute(
                sa.select(sa.func.coalesce(sa.func.sum(jobs.c.nonces), 0)).where(open_jobs)
            ).scalar_one()
            if waiting + len(request.nonces) > self._settings.max_queued_nonces:
                raise Refusal(
                    429,
                    f"{waiting} nonces are queued",
                    wanted=f"at most {self._settings.max_queued_nonces} with these {len(request.nonces)}",
                    do="send it again later",
                    retry_after=10,
                )
            if request.url is not None and self._announced(connection) >= self._settings.max_pending_jobs:
                raise Refusal(
                    429,
                    "too many callbacks of artifact jobs are undelivered",
                    wanted=f"fewer than {self._settings.max_pending_jobs}",
                    do="repair their receivers, or send the job without a url and ask for its result",
                    retry_after=10,
                )
            seq = connection.execute(sa.select(sa.func.coalesce(sa.func.max(jobs.c.seq), 0) + 1)).scalar_one()
            row = {
                "id": job_id,
                "seq": seq,
                "status": "queued",
                "nonces": len(request.nonces),
                "request": request.model_dump_json(),
                "created_at": time.time(),
            }
            connection.execute(jobs.insert().values(row))
        return {"status": "queued", "request_id": job_id, "queued_count": int(waiting) + len(request.nonces)}

    def _announced(self, connection: sa.Connection) -> int:
        """Return how many callbacks of jobs are undelivered, with those of the jobs that are not finished."""
        jobs = self._db["jobs"]
        has_url = sa.func.json_extract(jobs.c.request, "$.url").is_not(None)
        query = sa.select(sa.func.count()).where(jobs.c.status.in_(["queued", "running"]), has_url)
        return int(connection.execute(query).scalar_one()) + self._outbox.owed(connection, None)

    def watch(self, job_id: str) -> "Future[dict[str, Any]]":
        """Return a future of the job's state once it is finished."""
        future: Future[dict[str, Any]] = Future()
        with self._lock:
            self._waiting.setdefault(job_id, []).append(future)
        state = self.state(job_id)
        if state["status"] not in ("queued", "running"):
            self._tell(job_id, state)
        return future

    def forget(self, job_id: str, future: "Future[dict[str, Any]]") -> None:
        """Give up waiting."""
        with self._lock:
            waiting = self._waiting.get(job_id, [])
            if future in waiting:
                waiting.remove(future)
            if not waiting:
                self._waiting.pop(job_id, None)

    def state(self, job_id: str) -> dict[str, Any]:
        """Return status and result of a job.

        Raises:
            Refusal: 404, unknown, or finished longer ago than results are kept.
        """
        jobs = self._db["jobs"]
        with self._db.read() as connection:
            row = connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).mappings().first()
        if row is None or (row["finished_at"] and time.time() - row["finished_at"] > self._settings.job_ttl):
            raise Refusal(
                404,
                "no such request",
                wanted=f"the id of a request that finished less than {self._settings.job_ttl:g} s ago",
                do="send the request again",
            )
        state = {"status": row["status"], "request_id": job_id}
        if row["error"]:
            state["error"] = row["error"]
        return state | (loads(row["result"], "job result") if row["result"] else {})

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Cancel a job that is not finished; return its state."""
        self.state(job_id)
        self._finish(job_id, "cancelled")
        return self.state(job_id)

    def has_open(self) -> bool:
        """Say whether any job waits or runs."""
        jobs = self._db["jobs"]
        query = sa.select(sa.exists().where(jobs.c.status.in_(["queued", "running"])))
        with self._db.read() as connection:
            return bool(connection.execute(query).scalar_one())

    def counts(self) -> dict[str, int]:
        """Return how many jobs wait and run."""
        jobs = self._db["jobs"]
        query = sa.select(jobs.c.status, sa.func.count()).where(jobs.c.status.in_(["queued", "running"]))
        with self._db.read() as connection:
            found: dict[str, int] = {row[0]: row[1] for row in connection.execute(query.group_by(jobs.c.status))}
        return {"queued": found.get("queued", 0), "running": found.get("running", 0)}

    def prune(self) -> None:
        """Delete results that are older than they are kept."""
        jobs = self._db["jobs"]
        with self._db.write() as connection:
            connection.execute(jobs.delete().where(jobs.c.finished_at < time.time() - self._settings.job_ttl))

    def step(self, deployment: Deployment) -> bool:
        """Do one batch of the oldest job, in the engine's thread; return False if no job waits."""
        try:
            return self._step(deployment)
        except StorageError as error:
            log.warning("job waits", reason=error.seen)
            time.sleep(STORAGE_PAUSE)
            return True

    def _step(self, deployment: Deployment) -> bool:
        if self._running is None or self._is_finished(self._running[0]):
            self._running = None
            self._running = self._next(deployment)
        if self._running is None:
            return False
        job_id, request, batches, records = self._running
        try:
            batch = next(batches, None)
            if batch is not None:
                records.extend(batch)
                return True
            result = self._result(request, records, deployment.dtype)
        except Exception as error:  # an engine may raise any error, and its job must still end
            if self._closing.is_set():  # the engine ended with the service, and the job runs again after the next start
                raise
            log.exception("job failed")
            self._finish(job_id, "failed", error=str(error))
        else:
            self._finish(job_id, "completed", result, request)
        # Only now: where the disk is full, finishing is tried again.
        self._running = None
        return True

    def _result(self, request: GenerateRequest, records: list[Record], dtype: str) -> dict[str, Any]:
        if len(records) != len(request.nonces):
            raise ProofFormatError(
                f"{len(records)} vectors for {len(request.nonces)} nonces",
                wanted="one each",
                do="send the request again",
            )
        size = _pipeline(request).vector_size
        if request.validation is None:
            artifacts = [{"nonce": r.nonce, "vector_b64": encode_vector(_vector(r))} for r in records]
            return {"artifacts": artifacts, "encoding": {"dtype": "f16", "k_dim": size, "endian": "le"}}
        received = {artifact.nonce: _decode(artifact.vector_b64, size) for artifact in request.validation.artifacts}
        errors = residuals([VectorRecord(r.nonce, received[r.nonce]) for r in records], records)
        return judge_vectors(request, [r.nonce for r in records], errors, dtype, self._settings)

    def _is_finished(self, job_id: str) -> bool:
        jobs = self._db["jobs"]
        with self._db.read() as connection:
            status = connection.execute(sa.select(jobs.c.status).where(jobs.c.id == job_id)).scalar()
        return status != "running"

    def _next(self, deployment: Deployment) -> Any:
        jobs = self._db["jobs"]
        with self._db.write() as connection:
            queued = sa.select(jobs).where(jobs.c.status == "queued").order_by(jobs.c.seq).limit(1)
            row = connection.execute(queued).mappings().first()
            if row is None:
                return None
            connection.execute(jobs.update().where(jobs.c.id == row["id"]).values(status="running"))
        request = GenerateRequest.model_validate_json(row["request"])
        return (row["id"], request, _compute(deployment, request), [])

    def _finish(
        self,
        job_id: str,
        status: str,
        result: dict[str, Any] | None = None,
        request: GenerateRequest | None = None,
        error: str | None = None,
    ) -> None:
        jobs = self._db["jobs"]
        unfinished = (jobs.c.id == job_id) & jobs.c.status.in_(["queued", "running"])
        values = {"status": status, "result": dumps(result) if result else None, "error": error}
        with self._db.write() as connection:
            done = connection.execute(jobs.update().where(unfinished).values(finished_at=time.time(), **values))
            if done.rowcount and request is not None and request.url and result is not None:
                kind, body = _callback(request, result)
                self._outbox.add(connection, None, kind, request.url, {"request_id": job_id} | body)
        self._tell(job_id, {"status": status, "request_id": job_id, **(result or {})})

    def _tell(self, job_id: str, state: dict[str, Any]) -> None:
        with self._lock:
            waiting = self._waiting.pop(job_id, [])
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_result(state)


def job_round(request: GenerateRequest, reference: str) -> Round:
    """Return the round of a job.

    Raises:
        UsageError: A field is out of range, or a nonce belongs to another node.
    """
    return Round(
        block_hash=request.block_hash,
        public_key=request.public_key,
        block_height=request.block_height,
        node_id=request.node_id,
        node_count=request.node_count,
        model=reference,
        preset=request.params.preset,
        seq_len=request.params.seq_len,
        r_target=2.0,
        strength=256 if request.poc_stronger_rng else 32,
    )


def _compute(deployment: Deployment, request: GenerateRequest) -> Iterator[list[Record]]:
    """Compute the vectors of a job. Nothing is computed, or fails, before the first batch is asked for."""
    engine = deployment.engine(request.params.seq_len, request.batch_size)
    header = Header(
        round=job_round(request, deployment.reference),
        pipeline=_pipeline(request),
        digest=deployment.digest,
        weights=deployment.weights,
        fingerprint=engine.fingerprint,
        nonces=(),
    )
    yield from compute(header, engine, request.nonces)


def _pipeline(request: GenerateRequest) -> Pipeline:
    return get_pipeline(request.params.preset)


def _decode(text: str, size: int) -> np.ndarray:
    try:
        return decode_vector(text, size)
    except ProofFormatError:
        return np.full(size, math.nan, dtype=np.float16)  # never a match


def _vector(record: Record) -> np.ndarray:
    if record.vector is None or not math.isfinite(float(np.sum(record.vector.astype(np.float64)))):
        raise ProofFormatError(
            f"the engine returned no finite vector for nonce {record.nonce}",
            wanted="finite vectors",
            do="check the checkpoint and the device",
        )
    return record.vector


def _callback(request: GenerateRequest, result: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    body = {name: getattr(request, name) for name in ("block_hash", "block_height", "public_key", "node_id")}
    return ("generated" if request.validation is None else "validated"), body | result
