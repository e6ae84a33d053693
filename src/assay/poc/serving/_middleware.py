"""Middleware in front of the routes of a vLLM server.

Paths are compared without the root path (``--root-path``), as the router does: a client may send it or leave it out.
"""

from collections.abc import Callable
from typing import Any

from starlette._utils import get_route_path  # the function by which starlette's router finds a route
from starlette.responses import JSONResponse

ASGI = Callable[[Any, Any, Any], Any]

WITHOUT_ENGINE = frozenset({"/tokenize", "/detokenize"})
"""POST routes that need no engine."""

MESSAGE = "Proof of Compute has this engine to itself for a while"
BODY = {"error": {"message": MESSAGE, "type": "service_unavailable", "param": None, "code": 503}}


class ChatBarrier:
    """Answers new work for the engine with 503 and ``Retry-After`` while ``closed()``; running requests go on.

    The service's own routes, under ``prefix``, stay open.
    """

    def __init__(self, app: ASGI, *, prefix: str, closed: Callable[[], bool]) -> None:
        self._app, self._prefix, self._closed = app, prefix, closed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or answer 503."""
        works = scope["type"] == "http" and scope["method"] == "POST" and get_route_path(scope) not in WITHOUT_ENGINE
        if not works or get_route_path(scope).startswith(self._prefix) or not self._closed():
            await self._app(scope, receive, send)
            return
        await JSONResponse(BODY, status_code=503, headers={"retry-after": "10"})(scope, receive, send)


class UnderPrefix:
    """Applies a middleware, made by ``middleware(app)``, to the routes under a prefix only."""

    def __init__(self, app: ASGI, *, prefix: str, middleware: Callable[[ASGI], ASGI]) -> None:
        self._app, self._prefix, self._inner = app, prefix, middleware(app)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, through the middleware if it is under the prefix."""
        under = scope["type"] == "http" and get_route_path(scope).startswith(self._prefix)
        await (self._inner if under else self._app)(scope, receive, send)
