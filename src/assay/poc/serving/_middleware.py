"""Middleware in front of the routes of a vLLM server.

Paths are compared without the root path (``--root-path``), as the router does: a client may send it or leave it out.
"""

from collections.abc import Callable
from typing import Any

from starlette._utils import get_route_path  # the function by which starlette's router finds a route

ASGI = Callable[[Any, Any, Any], Any]

WITHOUT_ENGINE = frozenset({"/tokenize", "/detokenize"})
"""POST routes that need no engine."""

BODY = (
    b'{"error": {"message": "Proof of Compute has this engine to itself for a while", '
    b'"type": "service_unavailable", "param": null, "code": 503}}'
)


class ChatBarrier:
    """Answers new work for the engine with 503 and ``Retry-After`` while ``closed``; running requests go on.

    Args:
        app: Application behind the barrier.
        prefix: Path of the service's own routes, which stay open.
        closed: Function that is called for every request.
    """

    def __init__(self, app: ASGI, *, prefix: str, closed: Callable[[], bool]) -> None:
        self._app, self._prefix, self._closed = app, prefix, closed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or answer 503."""
        works = scope["type"] == "http" and scope["method"] == "POST" and get_route_path(scope) not in WITHOUT_ENGINE
        if not works or get_route_path(scope).startswith(self._prefix) or not self._closed():
            await self._app(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"10")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": BODY})


class UnderPrefix:
    """Applies a middleware to the routes under a prefix only.

    Args:
        app: Application behind the middleware.
        prefix: Path of the routes.
        middleware: Function that makes the middleware from the application.
    """

    def __init__(self, app: ASGI, *, prefix: str, middleware: Callable[[ASGI], ASGI]) -> None:
        self._app, self._prefix, self._inner = app, prefix, middleware(app)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, through the middleware if it is under the prefix."""
        under = scope["type"] == "http" and get_route_path(scope).startswith(self._prefix)
        await (self._inner if under else self._app)(scope, receive, send)
