"""The work around every handler: key, body, errors, metrics and the headers of the answer.

It lives in the route, not in a middleware, so that mounting these routes leaves the other routes of
an application as they are. Only a service without keys has a middleware, which guards it against
other hosts and pages.
"""

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from enum import StrEnum
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import structlog
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection
from typing_extensions import override

from assay.errors import AssayError
from assay.files.jsonl import unique_keys
from assay.poc.net.logs import LogBudget
from assay.poc.net.metrics import Exported
from assay.poc.net.refusals import Refusal, refusal_of
from assay.poc.net.server_settings import ListenerSettings, is_loopback
from assay.poc.net.shares import PARTS, Shares, client_of

log = structlog.get_logger("assay.http")

HEAD = "assay.head"
"""Key of a scope that a ``HEAD`` request has. A handler that would begin a stream answers without.
"""

Handler = Callable[[Request], Coroutine[Any, Any, Response]]

BODY_SECONDS = 30.0  # in which a body must have arrived
BODY_FLOOR = 2**14  # bytes that come in a second at least
BODY_GRACE = 8.0  # seconds by which a body may be behind that
SMALL = 2**16
"""Bytes of a small body. Callbacks of a service have fewer."""

DISCARDED = 4
"""How many times its limit a body may come before it is refused. A proxy that still sends a body
when the answer to it comes loses that answer (Caddy does, one time in fifty); proxies in ``deploy``
stop a body where reading it ends."""

SAFE_HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
"""Headers of every answer: no cache keeps it, and no browser takes it for another type than it
says.
"""


class Scope(StrEnum):
    """The permission that a request needs: ``control`` includes all, ``validate`` ``read``."""

    CONTROL = "control"
    VALIDATE = "validate"
    READ = "read"

    @property
    def extra(self) -> dict[str, Any]:
        """The ``openapi_extra`` of a route that needs it; :func:`route_class` reads it."""
        return {"security": [{"bearer": []}], "x-scope": str(self)}


class Keys:
    """The keys of a server, stored as digests. Without keys every client may do everything.

    ``needed`` says that requests need a key even then, so that all are refused.
    """

    def __init__(self, settings: ListenerSettings, *, needed: bool = False) -> None:
        self._needed = needed
        scopes = list(Scope)  # the widest first
        by_scope = (settings.api_keys, settings.validate_keys, settings.read_keys)
        self._digests = [
            (_digest(key), scopes[i:]) for i, keys in enumerate(by_scope) for key in keys
        ]

    def check(self, authorization: str | None, scope: Scope) -> str | None:
        """Return the identity of a key's holder for rate limits; None where no key is needed.

        A request whose ``Authorization`` header has no known key is refused (401), or one that may
        do less (403).
        """
        if not (self._digests or self._needed):
            return None
        kind, _, key = (authorization or "").partition(" ")
        digest_of_key = _digest(key.strip()) if kind.lower() == "bearer" else b""
        # Every key is compared, in constant time, so that the time says nothing about which one was
        # close.
        granted = [
            scopes for digest, scopes in self._digests if hmac.compare_digest(digest, digest_of_key)
        ]
        if not granted:
            raise Refusal(
                401,
                "no valid API key",
                wanted="Authorization: Bearer KEY",
                do="send the key you were given",
            )
        if scope not in granted[0]:
            raise Refusal(
                403,
                "a key of another scope",
                wanted=f"one that may {scope}",
                do="ask for such a key",
            )
        return digest_of_key.hex()[:16]


def route_path(scope: Connection) -> str:
    """Return the path of a request without the root path, as the router compares it."""
    path = str(scope["path"])
    root = str(scope.get("root_path", ""))
    return path[len(root) :] if root and f"{path}/".startswith(f"{root}/") else path


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


class LocalOnly:
    """Refuses requests for another host name, and those that a page of another site caused.

    Host names can be made to resolve to 127.0.0.1, and a page can send forms, images and scripts
    across sites; either would let a page in the operator's browser use a service that has no keys.
    Paths outside ``prefix``, or outside each of several, are left alone; they are compared as the
    router does, which takes them with the root path (``--root-path``) and without it.
    """

    def __init__(self, app: ASGIApp, *, prefix: str | tuple[str, ...] = "") -> None:
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 403."""
        covered = scope["type"] == "http" and route_path(scope).startswith(self._prefix)
        if covered and not _is_local(dict(scope["headers"])):
            refusal = Refusal(
                403,
                "a request for another host, or from another site's page",
                wanted="Host: 127.0.0.1 and no other origin",
                do="open the service under 127.0.0.1, or start it with an API key",
            )
            await answer(refusal)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _is_local(headers: dict[bytes, bytes]) -> bool:
    host = headers.get(b"host", b"")
    foreign = headers.get(b"origin", b"http://" + host) not in (
        b"http://" + host,
        b"https://" + host,
    )
    # Only browsers send it, and no page can change it.
    site = headers.get(b"sec-fetch-site", b"none")
    try:
        named = urlsplit(f"//{host.decode('latin-1')}").hostname or ""
    except ValueError:
        return False
    return not foreign and site in (b"none", b"same-origin") and is_loopback(named)


class Problem(BaseModel):
    """The reason of a refusal, what was wanted, and what to do."""

    model_config = ConfigDict(extra="allow")

    detail: str
    wanted: str
    do: str


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the ``responses`` of a route: its possible refusals, those of keys included."""
    return {status: {"model": Problem} for status in (401, 403, *statuses)}


class _Received(Request):
    """A request whose body was received, and parsed where it is JSON."""

    def __init__(self, request: Request, body: bytes, values: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._received = body
        self._values = values

    async def body(self) -> bytes:
        return self._received

    async def json(self) -> Any:
        return self._values


class HeadRoute(APIRoute):
    """A route that answers ``HEAD`` as ``GET`` (RFC 9110). The server leaves the body out."""

    @override
    def matches(self, scope: Connection) -> tuple[Match, Connection]:
        return super().matches(self._as_get(scope))

    @override
    async def handle(self, scope: Connection, receive: Receive, send: Send) -> None:
        await super().handle(self._as_get(scope), receive, send)

    def _as_get(self, scope: Connection) -> Connection:
        is_head = (
            scope["type"] == "http" and scope["method"] == "HEAD" and "GET" in (self.methods or ())
        )
        return {**scope, "method": "GET", HEAD: True} if is_head else scope


def route_class(
    keys: Keys,
    settings: ListenerSettings,
    metrics: Exported | None = None,
    *,
    untyped: bool = False,
) -> type[APIRoute]:
    """Return a class of routes that ask for keys, bound bodies, and answer in three parts.

    With ``untyped`` a body without a content type is JSON. A page of another site could send one
    without asking the browser, so a service without keys has :class:`LocalOnly` before them.
    """
    bodies = Bodies(settings.max_body, settings.max_bodies)
    budget = LogBudget()

    class Route(HeadRoute):
        def get_route_handler(self) -> Handler:
            inner = super().get_route_handler()
            scope = (self.openapi_extra or {}).get("x-scope")
            path = self.path_format
            has_body = self.body_field is not None
            # Prometheus sees no increase in a series that appears.
            if metrics is not None:
                metrics.requests.labels(path, "200")
                metrics.request_seconds.labels(path)

            async def respond(request: Request) -> Response:
                host = request.client.host if request.client else ""
                holder = (
                    keys.check(request.headers.get("authorization"), Scope(scope))
                    if scope is not None
                    else None
                )
                request.state.client = holder or client_of(host)
                if request.method in ("GET", "HEAD"):
                    return await inner(request)
                if untyped and "content-type" not in request.headers:
                    # The list that the headers were made of, so that refusals know of it too.
                    request.scope["headers"].append((b"content-type", b"application/json"))
                async with bodies.read(request) as body:
                    values = _parsed(body) if has_body and body and _says_json(request) else None
                    return await inner(_Received(request, body, values))

            return partial(observed, respond, path=path, metrics=metrics, budget=budget)

    return Route


async def observed(
    respond: Handler, request: Request, *, path: str, metrics: Exported | None, budget: LogBudget
) -> Response:
    """Return the response of a handler, or of its error, which is counted and logged."""
    started = time.perf_counter()
    response = await _or_refusal(respond, request)
    response.headers.update({k: v for k, v in SAFE_HEADERS.items() if k not in response.headers})
    if response.status_code >= 400:
        caller = request.client.host if request.client else None
        budget.info(log, "refused", route=path, status=response.status_code, caller=caller)
    if metrics is not None:
        metrics.requests.labels(path, str(response.status_code)).inc()
        metrics.request_seconds.labels(path).observe(time.perf_counter() - started)
    return response


async def _or_refusal(respond: Handler, request: Request) -> Response:
    """Return the response of a handler, or the answer that its error stands for."""
    try:
        return await respond(request)
    except RequestValidationError as error:
        return answer(_malformed(error, request))
    except HTTPException as error:
        return answer(
            Refusal(error.status_code, str(error.detail), wanted="a JSON body", do="see /docs")
        )
    except ClientDisconnect:
        # For the metrics: no client is there to read it.
        return Response(status_code=400)
    except AssayError as error:
        return answer(refusal_of(error))


class Bodies:
    """Reads request bodies: at most ``most`` bytes each, ``together`` bytes in memory at once.

    Each client has a share of that, and small bodies have room of their own, so that large ones
    never keep a callback out.
    """

    def __init__(self, most: int, together: int) -> None:
        self._most = most
        self._large = Shares(together, max(most, together // PARTS))
        self._small = Shares(max(together // 4, PARTS * SMALL), max(together // 4 // PARTS, SMALL))

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Read a body and count it against the limits until the block ends.

        It is refused with 408 too slow, 413 too large, 503 no room beside the bodies of other
        requests.
        """
        body = bytearray()
        client = client_of(request.client.host) if request.client else None
        announced = request.headers.get("content-length", "0")
        clock = asyncio.get_running_loop().time
        size = int(announced) if announced.isdecimal() else 0
        come = 0
        began = clock()
        room = self._small if size <= SMALL else self._large
        try:
            try:
                async with asyncio.timeout(BODY_GRACE) as limit:
                    async for chunk in request.stream():
                        come += len(chunk)
                        size = max(size, come)
                        if size <= self._most:
                            room.give(client, len(body))
                            room = self._small if size <= SMALL else self._large
                            size_with_chunk = len(body) + len(chunk)
                            if not room.fits(client, size_with_chunk):
                                body.clear()
                                raise Refusal(
                                    503,
                                    "too many large bodies at the same time",
                                    wanted="fewer at a time",
                                    do="send it again",
                                    retry_after=1,
                                )
                            room.take(client, size_with_chunk)
                            body += chunk
                        elif come > DISCARDED * self._most:
                            break
                        now = clock()
                        due = limit.when() or began
                        limit.reschedule(
                            min(
                                due + len(chunk) / BODY_FLOOR,
                                now + BODY_GRACE,
                                began + BODY_SECONDS,
                            )
                        )
            except TimeoutError:
                if size <= self._most:
                    raise Refusal(
                        408,
                        "a body that does not come to its end",
                        wanted=f"{BODY_FLOOR} bytes a second, and all of it in {BODY_SECONDS:g} s",
                        do="resend",
                    ) from None
            if size > self._most:
                raise Refusal(
                    413,
                    "a body that is too large",
                    wanted=f"at most {self._most} bytes",
                    do="split the request",
                )
            yield bytes(body)
        finally:
            room.give(client, len(body))


def answer(refusal: Refusal) -> Response:
    """Return the response that a refusal stands for."""
    headers = (
        SAFE_HEADERS
        | refusal.headers
        | ({"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {})
    )
    text = json.dumps(refusal.body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(
        text.encode("utf-8", "replace"),  # a request may hold unpaired surrogates, no response can
        status_code=refusal.status,
        headers=headers,
        media_type="application/json",
    )


async def not_found(request: Request, error: Exception) -> Response:
    """Answer what no route takes: an unknown path, or a method that a path does not have."""
    assert isinstance(error, HTTPException)
    refusal = Refusal(
        error.status_code,
        f"{request.method} {request.url.path}",
        wanted="a call of the API",
        do="see /docs for the paths of the service and their methods",
    )
    response = answer(refusal)
    response.headers.update(error.headers or {})
    return response


def _says_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or (
        kind.startswith("application/") and kind.endswith("+json")
    )


def _parsed(body: bytes) -> Any:
    """Parse a JSON body. Numbers that are not finite are for the fields to refuse: a distance may
    be NaN.
    """
    try:
        return json.loads(body.decode(), object_pairs_hook=unique_keys)
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:
        reason = str(error)
    errors = [{"loc": ["body"], "msg": reason, "type": "json_invalid"}]
    raise Refusal(
        422,
        f"a body that is not JSON: {reason}",
        wanted="one JSON value in UTF-8, every key once",
        do="correct it",
        fields={"errors": errors},
    )


def _malformed(error: RequestValidationError, request: Request) -> Refusal:
    # Without the offending input: it may be long, secret, or NaN, which has no form in JSON.
    faults = [{"loc": list(e["loc"]), "msg": e["msg"], "type": e["type"]} for e in error.errors()]
    first_fault = faults[0] if faults else {"loc": [], "msg": "malformed"}
    where = ".".join(str(part) for part in first_fault["loc"])
    wanted = "a body as in /docs"
    do = "correct it"
    if first_fault["loc"][:1] == ["body"] and not _says_json(request):
        wanted = "a JSON body that is announced as one"
        do = "send the header Content-Type: application/json"
    return Refusal(
        422, f"{where}: {first_fault['msg']}", wanted=wanted, do=do, fields={"errors": faults[:20]}
    )
