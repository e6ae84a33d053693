"""The work around every handler: key, body, errors, metrics and the headers of the answer.

It lives in the route, not in a middleware, so that mounting these routes leaves the other routes of
an application as they are. Only a service without keys has a middleware, which guards it against
other hosts and pages.
"""

import json
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import structlog
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import Receive, Send
from starlette.types import Scope as Connection
from typing_extensions import override

from assay.errors import AssayError
from assay.files.jsonl import unique_keys
from assay.poc.net.answers import SAFE_HEADERS, answer
from assay.poc.net.bodies import Bodies
from assay.poc.net.keys import Keys, Scope
from assay.poc.net.logs import LogBudget
from assay.poc.net.metrics import Exported
from assay.poc.net.refusals import Refusal, refusal_of
from assay.poc.net.server_settings import ListenerSettings
from assay.poc.net.shares import client_of

log = structlog.get_logger("assay.http")

HEAD = "assay.head"
"""Key of a scope that a ``HEAD`` request has. A handler that would begin a stream answers without.
"""

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


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
