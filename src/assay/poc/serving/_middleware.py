"""What stands before the routes of a vLLM server: chat waits while a round has the engine to itself."""

from collections.abc import Callable
from typing import Any

__all__ = ["Barrier", "Under"]

ASGI = Callable[[Any, Any, Any], Any]

FREE = frozenset({"/tokenize", "/detokenize"})
"""Calls with a body that need no engine."""

BODY = (
    b'{"error": {"message": "Proof of Compute has this engine to itself for a while", '
    b'"type": "service_unavailable", "param": null, "code": 503}}'
)


class Barrier:
    """Answers 503 with ``Retry-After`` to new work for the engine while ``closed``; what runs is never touched.

    Args:
        app: the application.
        prefix: of our own routes, which stay open.
        closed: asked for every request.
    """

    def __init__(self, app: ASGI, *, prefix: str, closed: Callable[[], bool]) -> None:
        self._app, self._prefix, self._closed = app, prefix, closed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or answer 503."""
        works = scope["type"] == "http" and scope["method"] == "POST" and scope["path"] not in FREE
        if not works or scope["path"].startswith(self._prefix) or not self._closed():
            await self._app(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"10")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": BODY})


class Under:
    """Puts a middleware before the routes under a prefix only.

    Args:
        app: the application.
        prefix: of the routes.
        middleware: makes the middleware from the application.
    """

    def __init__(self, app: ASGI, *, prefix: str, middleware: Callable[[ASGI], ASGI]) -> None:
        self._app, self._prefix, self._inner = app, prefix, middleware(app)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, through the middleware where it is under the prefix."""
        ours = scope["type"] == "http" and scope["path"].startswith(self._prefix)
        await (self._inner if ours else self._app)(scope, receive, send)
