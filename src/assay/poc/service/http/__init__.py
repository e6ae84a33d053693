"""The HTTP surface of the service: routes, keys, the bodies of responses, and the receiver of callbacks."""

from assay.poc.service.http._app import attach, create_app
from assay.poc.service.http._auth import Keys, Scope, is_loopback
from assay.poc.service.http._guarded_route import needs, route_class
from assay.poc.service.http._local_only import LocalOnly
from assay.poc.service.http._receiver import Received, create_receiver
from assay.poc.service.http._routes import PREFIX
from assay.poc.service.http._server import run_app, serve

__all__ = [
    "PREFIX",
    "Keys",
    "LocalOnly",
    "Received",
    "Scope",
    "attach",
    "create_app",
    "create_receiver",
    "is_loopback",
    "needs",
    "route_class",
    "run_app",
    "serve",
]
