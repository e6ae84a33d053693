"""The body of ``/status``, and the snapshot of every second, made once for all readers.

docs/service.md describes both.
"""

import asyncio
import time

import structlog
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from assay._version import __version__
from assay.errors import AssayError
from assay.files.jsonl import JsonObject, dumps
from assay.poc.net.broadcast import Broadcast
from assay.poc.net.refusals import Refusal
from assay.poc.net.routes import SAFE_HEADERS, Keys, Scope
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.service.controller import Controller
from assay.poc.service.rounds import StoredRound

log = structlog.get_logger("assay.feed")

PERIOD = 1.0
STATUS_AGE = 0.1  # seconds for which an encoded /status is reused while nothing changes
PRUNE_EVERY = 600.0
_SAFE = [(name.encode(), value.encode()) for name, value in SAFE_HEADERS.items()]
SCHEMA = "assay.poc.snapshot/1"

_NOTHING = dict.fromkeys(
    ("valid_rate", "valid_rate_error", "expected_rate", "expected_rate_error", "block_factor", "block_factor_error")
)


class Feed(Broadcast):
    """Keeps the latest snapshot of a controller and hands it to event streams, metrics and the dashboard."""

    def __init__(self, controller: Controller) -> None:
        settings = controller.settings
        super().__init__(controller.closing, most=settings.max_streams, most_of_client=settings.max_client_streams)
        self._controller = controller
        self.values: JsonObject = {}
        """The latest snapshot; :attr:`latest` holds it as JSON."""
        self._status = b""
        self._status_key: object = None
        self._status_until = 0.0

    async def run(self) -> None:
        """Refresh the snapshot every second until cancelled, and delete what is old from the database."""
        pruned = 0.0
        while True:
            started = time.monotonic()
            try:
                await self.refresh()
                await self._controller.call(self._controller.save_if_needed)
                if started - pruned > PRUNE_EVERY:
                    await self._controller.call(self._prune)
                    pruned = started
            except AssayError as error:
                log.warning("snapshot", reason=error.seen)
            await asyncio.sleep(max(0.0, PERIOD - (time.monotonic() - started)))

    async def refresh(self) -> None:
        """Make a snapshot now."""
        self.values = await self._controller.call(snapshot, self._controller)
        await self.publish(dumps(self.values).encode())

    def status(self) -> bytes:
        """Return the body of ``/status``, encoded once for many readers."""
        progress = self._controller.progress
        key = (self._controller.state, self._controller.error, id(progress), progress and progress.checked)
        now = time.monotonic()
        if key != self._status_key or now > self._status_until:
            self._status = dumps(status(self._controller)).encode()
            self._status_key, self._status_until = key, now + STATUS_AGE
        return self._status

    def _prune(self) -> None:
        keep = self._controller.settings.keep_rounds
        self._controller.rounds.prune(keep)
        self._controller.outbox.prune(keep)
        self._controller.jobs.prune()


def snapshot(controller: Controller) -> JsonObject:
    """Collect a snapshot. Reads the database, so it runs in a thread, once a second for all readers together."""
    progress, deployment = controller.progress, controller.deployment
    return {
        "schema": SCHEMA,
        "time": time.time(),
        "version": __version__,
        "uptime_seconds": time.time() - controller.started_at,
        "state": str(controller.state),
        "ready": deployment is not None,
        "paused": controller.paused,
        "error": controller.error,
        "model": deployment
        and {"reference": deployment.reference, "digest": deployment.digest, "dtype": deployment.dtype},
        "round": progress and progress.stored.public(),
        "checked": progress.checked if progress else 0,
        "valid": progress.valid if progress else 0,
        "next_nonce": progress.next_nonce if progress else None,
        "seconds": progress.seconds if progress else 0.0,
        "nonces_per_second": progress.current_rate if progress and str(controller.state) == "GENERATING" else 0.0,
        **(progress.expectation() if progress else _NOTHING),
        "histogram": progress.histogram() if progress else None,
        "callbacks": controller.outbox.counts(),
        "jobs": controller.jobs.counts(),
        "verdicts": controller.judge.last(),
    }


def status(controller: Controller, found: list[tuple[int, float]] | None = None) -> JsonObject:
    """Return state and counts in the fields of both published forms, with the valid nonces ``found``, or the latest."""
    progress, state = controller.progress, str(controller.state)
    if found is None:
        found = progress.latest() if progress else []
    has_distances = progress is not None and not progress.publishes_vectors
    return {
        "state": state,
        "valid_nonces": [nonce for nonce, _ in found],
        "valid_distances": [distance for _, distance in found] if has_distances else [],
        "total_checked": progress.checked if progress else 0,
        "total_valid": progress.valid if progress else 0,
        "elapsed_seconds": progress.seconds if progress else 0.0,
        "rate_per_second": progress.rate if progress else 0.0,
        "r_target": progress.stored.r_target if progress else None,
        "status": state,
        "config": _config(progress.stored) if progress else None,
        "stats": {"total_processed": progress.checked, "nonces_per_second": progress.rate} if progress else None,
        "ready": controller.deployment is not None,
        "paused": controller.paused,
        "error": controller.error,
    }


def status_after(controller: Controller, after: int, limit: int) -> JsonObject:
    """Return :func:`status` with the first ``limit`` valid nonces above ``after``, from the database."""
    progress = controller.progress
    found = controller.rounds.recent_valid(progress.stored.id, after=after, limit=limit) if progress else []
    return status(controller, found)


def _config(stored: StoredRound) -> JsonObject:
    names = ("block_hash", "block_height", "public_key", "node_id", "node_count", "group_id", "n_groups", "seq_len")
    return {name: getattr(stored, name) for name in names} | {"k_dim": get_pipeline(stored.preset).vector_size}


class QuickStatus:
    """Answers the plain ``GET path`` of clients that may read before routing, and passes everything else on.

    A thousand readers at once take processor time from the engine beside them. Inside the application such an answer
    costs 9 µs of it instead of 113, twelve times less, because the rest is routing and the parsing of parameters that
    it does not have (``python benchmarks/service_status.py``, one core of a CPU machine).

    The application's own route at ``path`` answers the same, refusals included.
    """

    def __init__(self, app: ASGIApp, *, path: str, controller: Controller, keys: Keys, feed: Feed) -> None:
        self._app, self._path, self._keys, self._feed = app, path, keys, feed
        self._answered = controller.metrics.requests.labels(path, "200")
        self._seconds = controller.metrics.request_seconds.labels(path)

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Answer, or pass the request on."""
        if not self._is_plain(scope):
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        body = self._feed.status()
        headers = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json"), *_SAFE]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        self._answered.inc()
        self._seconds.observe(time.perf_counter() - started)

    def _is_plain(self, scope: Connection) -> bool:
        if scope["type"] != "http" or scope["path"] != self._path or scope["method"] != "GET" or scope["query_string"]:
            return False
        given = next((value for name, value in scope["headers"] if name == b"authorization"), None)
        try:
            self._keys.check(given and given.decode("latin-1"), Scope.READ)
        except Refusal:
            return False
        return True
