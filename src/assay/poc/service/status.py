"""The body of ``/status``, encoded once for many readers. docs/service.md describes it."""

import time

from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from assay.files.jsonl import JsonObject, dumps
from assay.poc.net.refusals import Refusal
from assay.poc.net.routes import Keys, Scope, send_json
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.service.controller import Controller
from assay.poc.service.rounds import StoredRound

STATUS_AGE = 0.1  # seconds for which an encoded /status is reused while nothing changes


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


class StatusText:
    """The encoded body of ``/status`` of a controller."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._text = b""
        self._key: object = None
        self._until = 0.0

    def latest(self) -> bytes:
        """Return the body, encoded once for many readers."""
        progress = self._controller.progress
        key = (self._controller.state, self._controller.error, id(progress), progress and progress.checked)
        now = time.monotonic()
        if key != self._key or now > self._until:
            self._text = dumps(status(self._controller)).encode()
            self._key, self._until = key, now + STATUS_AGE
        return self._text


class QuickStatus:
    """Answers the plain ``GET path`` of clients that may read before routing, and passes everything else on.

    A thousand readers at once take processor time from the engine beside them. Inside the application such an answer
    costs 9 µs of it instead of 113, twelve times less, because the rest is routing and the parsing of parameters that
    it does not have (one core of a CPU machine, measured at 8580455f by its benchmarks/service_status.py).

    The application's own route at ``path`` answers the same, refusals included.
    """

    def __init__(self, app: ASGIApp, *, path: str, controller: Controller, keys: Keys, text: StatusText) -> None:
        self._app, self._path, self._keys, self._text = app, path, keys, text
        self._answered = controller.metrics.requests.labels(path, "200")
        self._seconds = controller.metrics.request_seconds.labels(path)

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Answer, or pass the request on."""
        if not self._is_plain(scope):
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        await send_json(send, self._text.latest())
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
