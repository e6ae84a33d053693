"""The service: the published HTTP API on one engine, durable, bounded and observable.

Needs the extra ``serve``. docs/service.md describes it; ``assay poc serve`` runs it.
"""

from assay.errors import BackendUnavailable

try:
    from assay.poc.service._app import attach, create_app
    from assay.poc.service._auth import is_loopback
    from assay.poc.service._controller import Controller
    from assay.poc.service._deployment import Deployment
    from assay.poc.service._logs import configure_logs
    from assay.poc.service._outbox import Outbox, open_outbox
    from assay.poc.service._receiver import Received, create_receiver
    from assay.poc.service._server import run_app, serve
    from assay.poc.service._settings import Settings, check_secrets
    from assay.poc.service._states import TRANSITIONS, State
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
