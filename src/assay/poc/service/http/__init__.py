"""The HTTP surface of the service: routes, keys, the bodies of responses, and the receiver of callbacks."""

from assay.poc.service._logs import LogBudget
from assay.poc.service._refusals import Refusal, refusal_of
from assay.poc.service.http._app import PREFIX, PREFIXES, attach, create_app
from assay.poc.service.http._broadcast import Broadcast
from assay.poc.service.http._lifespan import kept_running, running
from assay.poc.service.http._receiver import Received, create_receiver, receive
from assay.poc.service.http._route import (
    SAFE_HEADERS,
    Bodies,
    Keys,
    LocalOnly,
    Scope,
    answer,
    guarded,
    is_loopback,
    needs,
    not_found,
    route_class,
)
from assay.poc.service.http._server import check_host, listen, run_app, serve
from assay.poc.service.http._signatures import Signatures, message_id

__all__ = [
    "PREFIX",
    "PREFIXES",
    "SAFE_HEADERS",
    "Bodies",
    "Broadcast",
    "Keys",
    "LocalOnly",
    "LogBudget",
    "Received",
    "Refusal",
    "Scope",
    "Signatures",
    "answer",
    "attach",
    "check_host",
    "create_app",
    "create_receiver",
    "guarded",
    "is_loopback",
    "kept_running",
    "listen",
    "message_id",
    "needs",
    "not_found",
    "receive",
    "refusal_of",
    "route_class",
    "run_app",
    "running",
    "serve",
]
