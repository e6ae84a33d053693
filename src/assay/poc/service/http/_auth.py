"""Who may ask: bearer keys with what they may do, and the guard of a service without keys."""

import hashlib
import hmac
import ipaddress
from enum import StrEnum
from functools import lru_cache
from urllib.parse import urlsplit

from starlette._utils import get_route_path  # the function by which starlette's router finds a route
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from assay.poc.service._refusals import Refusal
from assay.poc.service._settings import Settings

SAFE_HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
"""Headers of every answer: no cache keeps it, and no browser takes it for another type than it says."""


class Scope(StrEnum):
    """The permission that a request needs. ``control`` includes the others, and ``validate`` includes ``read``."""

    CONTROL = "control"
    VALIDATE = "validate"
    READ = "read"


class Keys:
    """The keys of a service, kept as digests.

    Args:
        settings: Settings with the keys. Without any key, every client that reaches the port may do everything.
        needed: Whether requests need a key even without any in the settings, so that all are refused.
    """

    def __init__(self, settings: Settings, *, needed: bool = False) -> None:
        self._needed = needed
        scopes = list(Scope)  # the widest first
        by_scope = (settings.api_keys, settings.validate_keys, settings.read_keys)
        self._digests = [(_digest(key), scopes[i:]) for i, keys in enumerate(by_scope) for key in keys]

    def check(self, authorization: str | None, scope: Scope) -> None:
        """Refuse a request whose ``Authorization`` header does not allow ``scope``.

        Raises:
            Refusal: 401 without a known key, 403 with one that may do less.
        """
        if not (self._digests or self._needed):
            return
        kind, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip()) if kind.lower() == "bearer" else b""
        # Every key is compared, in constant time, so that the time says nothing about which one was close.
        granted = [scopes for digest, scopes in self._digests if hmac.compare_digest(digest, given)]
        if not granted:
            raise Refusal(401, "no valid API key", wanted="Authorization: Bearer KEY", do="send the key you were given")
        if scope not in granted[0]:
            raise Refusal(403, "a key of another scope", wanted=f"one that may {scope}", do="ask for such a key")


def is_loopback(host: str) -> bool:
    """Return whether an address or name is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


class LocalOnly:
    """Refuses requests that name another host than this machine, or that a page of another site has caused.

    Host names can be made to resolve to 127.0.0.1, and a page can send forms, images and scripts across sites; either
    would let a page in the operator's browser use a service that has no keys. Paths outside ``prefix`` are left alone;
    they are compared as the router does, which takes them with the root path (``--root-path``) and without it.
    """

    def __init__(self, app: ASGIApp, *, prefix: str = "") -> None:
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 403."""
        guarded = scope["type"] == "http" and get_route_path(scope).startswith(self._prefix)
        if guarded and not _is_local(dict(scope["headers"])):
            refusal = Refusal(
                403,
                "a request for another host, or from another site's page",
                wanted="Host: 127.0.0.1 and no other origin",
                do="open the service under 127.0.0.1, or start it with an API key",
            )
            await JSONResponse(refusal.body, status_code=403, headers=SAFE_HEADERS)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _is_local(headers: dict[bytes, bytes]) -> bool:
    host, origin = headers.get(b"host", b""), headers.get(b"origin")
    foreign = origin is not None and origin.partition(b"//")[2] != host
    site = headers.get(b"sec-fetch-site", b"none")  # only browsers send it, and no page can change it
    return not foreign and site in (b"none", b"same-origin") and _is_here(host)


@lru_cache(maxsize=64)
def _is_here(host: bytes) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host.decode('latin-1')}").hostname or "")
    except ValueError:
        return False
