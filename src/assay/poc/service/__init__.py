"""The service: the published HTTP API for one model, durable, bounded and observable.

It needs the extra ``serve``. docs/service.md describes it; ``assay poc serve`` runs it.
"""

from assay.poc.net.logs import configure_logs
from assay.poc.service.app import attach, create_app, serve
from assay.poc.service.receiver import create_receiver
from assay.poc.service.rounds import State
from assay.poc.service.settings import Settings

__all__ = ["Settings", "State", "attach", "configure_logs", "create_app", "create_receiver", "serve"]
