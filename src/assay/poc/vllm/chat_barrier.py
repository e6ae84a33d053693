"""Which requests of a vLLM server are work for its engine, and how new ones are kept away."""

from collections.abc import Callable
from dataclasses import dataclass

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from assay.poc.net.local_only import route_path
from assay.poc.service.service_api import PREFIXES

WITHOUT_ENGINE = "/tokenize", "/detokenize"  # POST routes that need no engine

MESSAGE = "Proof of Compute has this engine to itself for a while"
BODY = {"error": {"message": MESSAGE, "type": "service_unavailable", "param": None, "code": 503}}


def asks_engine(scope: Connection) -> bool:
    """Return whether a request is work for the engine.

    Paths are compared as the router does, which takes them with the root path (``--root-path``) and
    without it.
    """
    return (
        scope["type"] == "http"
        and scope["method"] == "POST"
        and route_path(scope) not in WITHOUT_ENGINE
        and not route_path(scope).startswith(PREFIXES)
    )


@dataclass(eq=False)
class ChatBarrier:
    """Answers new chat with 503 and ``Retry-After`` while ``closed()``; running chat goes on."""

    app: ASGIApp
    closed: Callable[[], bool]

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 503."""
        if not asks_engine(scope) or not self.closed():
            await self.app(scope, receive, send)
            return
        await JSONResponse(BODY, status_code=503, headers={"retry-after": "10"})(
            scope, receive, send
        )
