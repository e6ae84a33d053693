"""Protects a service without keys from web pages that the operator's browser has open."""

from functools import lru_cache
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from assay.poc.service._refusals import Refusal
from assay.poc.service.http._auth import is_loopback

__all__ = ["LocalOnly"]


class LocalOnly:
    """Refuses requests that name another host than this machine, or come from a page of another origin.

    The first stops a name that was made to resolve to 127.0.0.1, the second a form that posts across sites.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 403."""
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            host, origin = headers.get(b"host", b""), headers.get(b"origin")
            foreign = origin is not None and origin.partition(b"//")[2] != host
            if foreign or not _is_here(host):
                refusal = Refusal(
                    403,
                    "a request for another host, or from another site's page",
                    wanted="Host: 127.0.0.1 and no other origin",
                    do="open the service under 127.0.0.1, or start it with an API key",
                )
                await JSONResponse(refusal.body, status_code=403)(scope, receive, send)
                return
        await self._app(scope, receive, send)


@lru_cache(maxsize=64)
def _is_here(host: bytes) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host.decode('latin-1')}").hostname or "")
    except ValueError:
        return False
