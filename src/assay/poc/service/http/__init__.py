"""The HTTP surface of the service: routes, keys, the bodies of responses, and the receiver of callbacks."""

from assay.poc.service.http._app import PREFIX, attach, create_app
from assay.poc.service.http._receiver import Received, create_receiver, receive
from assay.poc.service.http._route import Keys, LocalOnly, Scope, is_loopback, needs, route_class
from assay.poc.service.http._server import serve

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
    "receive",
    "route_class",
    "serve",
]
