"""The body of ``/status``, and the snapshot of every second. docs/service.md describes both."""

import time
from typing import Any

from assay._version import __version__
from assay.poc.protocol import get_pipeline
from assay.poc.service.runtime import Controller
from assay.poc.service.store import StoredRound

SCHEMA = "assay.poc.snapshot/1"

_NOTHING = {"valid_rate": None, "valid_rate_error": None, "expected_rate": None, "expected_rate_error": None}


def snapshot(controller: Controller) -> dict[str, Any]:
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


def status(controller: Controller) -> dict[str, Any]:
    """Return state and counts, with the latest valid nonces, in the fields of both published forms."""
    progress, state = controller.progress, str(controller.state)
    recent = progress.latest() if progress else []
    return {
        "state": state,
        **_valid(controller, recent),
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


def status_after(controller: Controller, after: int, limit: int) -> dict[str, Any]:
    """Return :func:`status` with the first ``limit`` valid nonces above ``after``, from the database."""
    progress = controller.progress
    found = controller.rounds.recent_valid(progress.stored.id, after=after, limit=limit) if progress else []
    return status(controller) | _valid(controller, found)


def _valid(controller: Controller, found: list[tuple[int, float]]) -> dict[str, Any]:
    vectors = controller.progress is not None and controller.progress.publishes_vectors
    return {
        "valid_nonces": [nonce for nonce, _ in found],
        "valid_distances": [] if vectors else [distance for _, distance in found],
    }


def _config(stored: StoredRound) -> dict[str, Any]:
    names = ("block_hash", "block_height", "public_key", "node_id", "node_count", "group_id", "n_groups", "seq_len")
    return {name: getattr(stored, name) for name in names} | {"k_dim": get_pipeline(stored.preset).vector_size}
