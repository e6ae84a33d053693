"""The body of ``/status``: the fields of both published forms, and ours. Waits for nothing."""

from typing import Any

from assay.poc.protocol import get_pipeline
from assay.poc.service.runtime import Controller
from assay.poc.service.store import StoredRound

__all__ = ["status", "status_after"]


def status(controller: Controller) -> dict[str, Any]:
    """Return state and counts, with the latest valid nonces."""
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
