"""The service: the published HTTP API on one engine, durable, bounded and observable.

Needs the extra ``serve``. docs/service.md describes it; ``assay poc serve`` runs it.
"""

from assay.errors import BackendUnavailable

try:
    from assay.poc.service._logs import configure_logs
    from assay.poc.service._settings import Settings, check_secrets
    from assay.poc.service._states import TRANSITIONS, State
    from assay.poc.service.http import Received, attach, create_app, create_receiver, is_loopback, run_app, serve
    from assay.poc.service.runtime import Controller, Deployment
    from assay.poc.service.store import Outbox, open_outbox
except ModuleNotFoundError as error:
    if (error.name or "assay").partition(".")[0] == "assay":
        raise
    raise BackendUnavailable(
        f"the package {error.name} is not installed",
        wanted="the packages of the service",
        do="pip install 'assay[serve]'",
    ) from error

__all__ = [
    "TRANSITIONS",
    "Controller",
    "Deployment",
    "Outbox",
    "Received",
    "Settings",
    "State",
    "attach",
    "check_secrets",
    "configure_logs",
    "create_app",
    "create_receiver",
    "is_loopback",
    "open_outbox",
    "run_app",
    "serve",
]
