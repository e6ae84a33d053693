"""The service: the published HTTP API for one model, durable, bounded and observable.

It needs the extra ``serve``. docs/service.md describes it; ``assay poc serve`` runs it.
"""

from assay.errors import BackendUnavailable, how_to_install

try:
    from assay.poc.service._logs import configure_logs
    from assay.poc.service._settings import Settings
    from assay.poc.service._states import State
    from assay.poc.service.http import Received, attach, create_app, create_receiver, receive, serve
    from assay.poc.service.runtime import Controller, Deployment
    from assay.poc.service.store import open_outbox
except ModuleNotFoundError as error:
    if (error.name or "assay").partition(".")[0] == "assay":
        raise
    raise BackendUnavailable(
        f"the package {error.name} is not installed",
        wanted="the packages of the service",
        do=how_to_install("serve"),
    ) from error

__all__ = [
    "Controller",
    "Deployment",
    "Received",
    "Settings",
    "State",
    "attach",
    "configure_logs",
    "create_app",
    "create_receiver",
    "open_outbox",
    "receive",
    "serve",
]
