"""Artifact jobs: vectors of given nonces, computed or checked while no round generates."""

import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import sqlalchemy as sa
import structlog
from pydantic import ValidationError

from assay.errors import StorageError
from assay.files.jsonl import JsonObject, dumps, loads
from assay.files.sqlite import Database
from assay.poc.net.deployment import Deployment
from assay.poc.net.refusals import Refusal
from assay.poc.net.shares import room_of
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.protocol.records import Record, artifact_fields, describe_packing, pack_record
from assay.poc.service.distance_judge import HonestNoise, judge_vectors
from assay.poc.service.outbox import Outbox
from assay.poc.service.request_bodies import GenerateRequest
from assay.poc.service.service_settings import ServiceSettings
from assay.poc.verdict.honest_noise import missing_law
from assay.poc.verdict.residuals import counted_distances, residuals

log = structlog.get_logger("assay.jobs")

STORAGE_PAUSE = 1.0


@dataclass
class _Running:
    """The job that runs, and its records so far."""

    id: str
    request: GenerateRequest
    batches: Iterator[list[Record]]
    records: list[Record] = field(default_factory=list)
    outcome: tuple[str, JsonObject | None, str | None] | None = None  # what _finish is given


class Jobs:
    """The queue of artifact jobs, on disk, and the one that runs."""

    def __init__(
        self,
        database: Database,
        outbox: Outbox,
        settings: ServiceSettings,
        noise: HonestNoise,
        closing: threading.Event,
    ) -> None:
        self._db = database
        self._outbox = outbox
        self._settings = settings
        self._closing = closing
        self._noise = noise
        self._table = database["jobs"]
        self._c = self._table.c
        self._is_open = self._c.status.in_(["queued", "running"])
        self._submitting = threading.Lock()
        self._waiting: dict[str, Future[JsonObject]] = {}
        self._running: _Running | None = None
        # What the last process was at begins again.
        database.change(
            self._table.update().where(self._c.status == "running").values(status="queued")
        )

    def submit(
        self, request: GenerateRequest, client: str | None = None, *, digest: str
    ) -> JsonObject:
        """Queue a job of a checkpoint durably; 429 where the queue has no room for this client.

        A ``client`` may queue what :func:`assay.poc.net.shares.room_of` says; None is this machine,
        which may fill the queue.
        """
        job_id = uuid.uuid4().hex
        last = sa.select(sa.func.coalesce(sa.func.max(self._c.seq), 0)).scalar_subquery()
        new = self._table.insert().values(
            id=job_id,
            seq=last + 1,
            status="queued",
            nonces=len(request.nonces),
            request=request.bounded().model_dump_json(),
            created_at=time.time(),
            client=client,
            digest=digest,
        )
        # Counting a long queue takes long, and rounds and receipts must be written meanwhile.
        with self._submitting:
            waiting = self._check_room(request, client)
            self._db.change(new)
        return {
            "status": "queued",
            "request_id": job_id,
            "queued_count": waiting + len(request.nonces),
        }

    def _check_room(self, request: GenerateRequest, client: str | None) -> int:
        """Refuse a job for which there is no room; return how many nonces wait before it."""
        settings = self._settings
        has_url = sa.func.json_extract(self._c.request, "$.url").is_not(None)
        nonces = sa.func.sum(self._c.nonces)
        is_of_client = self._c.client == client
        counts = [
            nonces,
            nonces.filter(is_of_client),
            sa.func.count().filter(has_url),
            sa.func.count().filter(has_url & is_of_client),
        ]
        (row,) = self._db.rows(sa.select(*counts).where(self._is_open))
        waiting, mine, announced, my_calls = (int(n or 0) for n in row)
        room = room_of(client, settings.max_queued_nonces, waiting, mine)
        if len(request.nonces) > room:
            raise Refusal(
                429,
                f"{waiting} nonces are queued, {mine} of them of this client",
                wanted=f"{max(0, room)} more at most",
                do="send it again later",
                retry_after=10,
            )
        undelivered = announced + self._outbox.owed_of_jobs()
        my_calls += self._outbox.owed_of_jobs(client=client)
        room = room_of(client, settings.max_pending_jobs, undelivered, my_calls)
        # A verdict is short, and the chain takes its absence for a fault of the prover.
        votes = request.chain and request.validation is not None
        if request.url is not None and not votes and room < 1:
            raise Refusal(
                429,
                f"{undelivered} callbacks of artifact jobs are undelivered, {my_calls} of "
                f"them of this client",
                wanted=f"fewer than {settings.max_pending_jobs}, half of what the others leave",
                do="repair their receivers, or send the job without a url and ask for its result",
                retry_after=10,
            )
        return waiting

    def watch(self, job_id: str) -> "Future[JsonObject]":
        """Return a future of a job's final state, for its sender."""
        future = self._waiting[job_id] = Future[JsonObject]()
        state = self.state(job_id)
        if state["status"] not in ("queued", "running"):
            self._tell(job_id, state)
        return future

    def state(self, job_id: str) -> JsonObject:
        """Return status and result of a job; 404 for one that is unknown or not kept."""
        rows = self._db.rows(sa.select(self._table).where(self._c.id == job_id))
        if not rows or (
            rows[0].finished_at
            and self._db.settled_time() - rows[0].finished_at > self._settings.job_ttl
        ):
            raise Refusal(
                404,
                "no such request",
                wanted=f"the id of a request that finished less than {self._settings.job_ttl:g} s "
                f"ago",
                do="send the request again",
            )
        row = rows[0]
        return _state(row.id, row.status, row.result, row.error)

    def cancel(self, job_id: str) -> JsonObject:
        """Cancel a job that is not finished; return its state."""
        self.state(job_id)
        self._finish(self._c.id == job_id, "cancelled")
        return self.state(job_id)

    def cancel_open(self) -> None:
        """Cancel all jobs that are not finished."""
        self._finish(sa.true(), "cancelled")

    def has_open(self) -> bool:
        """Return whether any job waits or runs."""
        return bool(self._db.scalar(sa.select(sa.exists().where(self._is_open))))

    def counts(self) -> dict[str, int]:
        """Return how many jobs wait and run."""
        status = self._c.status
        query = (
            sa.select(status, sa.func.count().label("jobs")).where(self._is_open).group_by(status)
        )
        return {"queued": 0, "running": 0} | {row.status: row.jobs for row in self._db.rows(query)}

    def prune(self) -> None:
        """Delete results that are older than they are kept."""
        oldest = self._db.settled_time() - self._settings.job_ttl
        self._db.change(self._table.delete().where(self._c.finished_at < oldest))

    def step(self, deployment: Deployment) -> bool:
        """Do one batch of the oldest job, in the engine's thread; return False if no job waits."""
        try:
            job = self._running  # which may have been cancelled
            if (
                job is None
                or self._db.scalar(sa.select(self._c.status).where(self._c.id == job.id))
                != "running"
            ):
                job = self._running = self._next(deployment)
            if job is None:
                return False
            self._advance(job, deployment)
        except StorageError as error:
            log.warning("job waits", reason=error.seen)
            time.sleep(STORAGE_PAUSE)
        return True

    def _advance(self, job: _Running, deployment: Deployment) -> None:
        """Do a batch of a job, or end it. Where the disk is full, ending it is tried again."""
        if job.outcome is None:
            try:
                if (batch := next(job.batches, None)) is not None:
                    job.records.extend(batch)
                    return
                result = self._result(job.request, job.records, deployment)
                job.outcome = ("completed", result, None)
            except Exception as error:  # an engine may raise any error, and its job must still end
                # The engine ended with the service, and the job runs again after the next start.
                if self._closing.is_set():
                    raise
                log.exception("job failed")
                job.outcome = ("failed", None, str(error))
        self._finish(self._c.id == job.id, *job.outcome)
        self._running = None

    def _result(
        self, request: GenerateRequest, records: list[Record], deployment: Deployment
    ) -> JsonObject:
        pipeline = get_pipeline(request.params.preset)
        round = request.round(deployment.reference)
        if request.validation is None:
            artifacts = [
                {"nonce": record.nonce, **artifact_fields(pack_record(record), pipeline)}
                for record in records
            ]
            return {"artifacts": artifacts, "encoding": describe_packing(pipeline)}
        received = request.received()
        validator = deployment.engine(round.seq_len, request.batch_size).fingerprint
        return judge_vectors(
            request,
            residuals(received, records),
            counted_distances(received, records),
            self._noise.of(pipeline, validator, deployment.digest, round),
            self._settings,
            missing=missing_law(deployment.reference, deployment.digest, round),
        )

    def _next(self, deployment: Deployment) -> _Running | None:
        """Begin the oldest job that waits and can be read."""
        c = self._c
        oldest = sa.select(c.id).where(c.status == "queued").order_by(c.seq).limit(1)
        begin = (
            self._table.update().where(c.id == oldest.scalar_subquery()).values(status="running")
        )
        while True:
            with self._db.write() as connection:
                row = connection.execute(begin.returning(c.id, c.request, c.digest)).first()
            if row is None:
                return None
            # Honest vectors of that model are others than this model has: no verdict on them here.
            if row.digest not in (None, deployment.digest):
                error = f"a job of the model {row.digest[:12]}"
                self._finish(c.id == row.id, "failed", error=error)
                continue
            try:
                request = GenerateRequest.model_validate_json(row.request)
            except ValidationError as invalid:  # stored by a version that takes other requests
                log.warning("job not understood", id=row.id)
                reason = f"stored by another version: {invalid.errors()[0]['msg']}"
                self._finish(c.id == row.id, "failed", error=reason)
                continue
            round = request.round(deployment.reference)
            claimed = None if request.validation is None else request.received()
            batches = deployment.compute(round.inputs(request.nonces), request.batch_size, claimed)
            return _Running(row.id, request, batches)

    def _finish(
        self,
        jobs: sa.ColumnElement[bool],
        status: str,
        result: JsonObject | None = None,
        error: str | None = None,
    ) -> None:
        """End those of some jobs that have not ended, owe the callback of a ``result``, and tell
        who waits.
        """
        stored = dumps(result) if result else None
        c = self._c
        still_open = (jobs, self._is_open)
        # A request may be large, and no route reads that of an ended job.
        end = self._table.update().values(
            status=status, result=stored, error=error, finished_at=time.time(), request="{}"
        )
        with self._db.write() as connection:
            query = sa.select(c.id, c.request, c.client).where(*still_open)
            rows = connection.execute(query).all()
            connection.execute(end.where(*still_open))
            if result is not None:
                for row in rows:
                    request = loads(row.request, "job")
                    if request["url"]:
                        names = ("block_hash", "block_height", "public_key", "node_id")
                        about = {"request_id": row.id} | {name: request[name] for name in names}
                        kind = "generated" if request["validation"] is None else "validated"
                        body = about | result
                        self._outbox.add(connection, None, kind, request["url"], body, row.client)
        for row in rows:
            self._tell(row.id, _state(row.id, status, stored, error))

    def _tell(self, job_id: str, state: JsonObject) -> None:
        future = self._waiting.pop(job_id, None)
        if future is not None and future.set_running_or_notify_cancel():
            future.set_result(state)


def _state(job_id: str, status: str, result: str | None, error: str | None) -> JsonObject:
    """Return what a client is told of a job, from columns of its row."""
    state = {"status": status, "request_id": job_id}
    if error:
        state["error"] = error
    return state | (loads(result, "job result") if result else {})
