"""What the dashboard sees: one JSON object per second. docs/service.md describes it."""

import time
from typing import Any

from assay._version import __version__
from assay.poc.service.runtime import Controller

__all__ = ["SCHEMA", "snapshot"]

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
