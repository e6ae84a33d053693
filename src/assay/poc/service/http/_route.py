"""The work around every handler of the service: key, body, errors, metrics and the headers of the answer.

It lives in the route, not in a middleware, so that mounting these routes leaves the other routes of an application
as they are.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import structlog
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from assay.errors import AssayError
from assay.poc.service._logs import Budget
from assay.poc.service._refusals import Refusal, refusal_of
from assay.poc.service.http._auth import SAFE_HEADERS, Keys, Scope
from assay.poc.service.runtime import Controller, Metrics

log = structlog.get_logger("assay.http")

Handler = Callable[[Request], Coroutine[Any, Any, Response]]

BODY_SECONDS = 30.0  # in which a body must have arrived


def needs(scope: Scope) -> dict[str, Any]:
    """Return the ``openapi_extra`` of a route that needs a scope; :func:`route_class` reads it."""
    return {"security": [{"bearer": []}], "x-scope": str(scope)}


def route_class(controller: Controller, keys: Keys) -> type[APIRoute]:
    """Return the class of the service's routes for one controller."""
    settings = controller.settings
    return guarded(keys, Bodies(settings.max_body, settings.max_bodies), controller.metrics)


def guarded(keys: Keys, bodies: "Bodies", metrics: Metrics | None = None) -> type[APIRoute]:
    """Return a class of routes that ask for keys, bound bodies, and answer in three parts."""
    budget = Budget()

    class Route(APIRoute):
        def get_route_handler(self) -> Handler:
            inner = super().get_route_handler()
            scope = (self.openapi_extra or {}).get("x-scope")
            path, has_body = self.path_format, self.body_field is not None

            async def respond(request: Request) -> Response:
                if scope is not None:
                    keys.check(request.headers.get("authorization"), Scope(scope))
                if request.method in ("GET", "HEAD"):
                    return await inner(request)
                async with bodies.read(request) as body:
                    # Where Starlette keeps both, so that the handler finds them.
                    request._body = body
                    if has_body and body and _says_json(request):
                        request._json = _parsed(body)
                    return await inner(request)

            async def handle(request: Request) -> Response:
                started = time.perf_counter()
                response = await _or_refusal(respond, request)
                response.headers.update({k: v for k, v in SAFE_HEADERS.items() if k not in response.headers})
                if response.status_code >= 400 and budget.take():
                    caller = request.client.host if request.client else None
                    log.info("refused", route=path, status=response.status_code, caller=caller, skipped=budget.skipped)
                if metrics is not None:
                    metrics.requests.labels(path, str(response.status_code)).inc()
                    metrics.request_seconds.labels(path).observe(time.perf_counter() - started)
                return response

            return handle

    return Route


async def _or_refusal(respond: Handler, request: Request) -> Response:
    """Return the response of a handler, or the answer that its error stands for."""
    try:
        return await respond(request)
    except RequestValidationError as error:
        return _answer(_malformed(error, request))
    except HTTPException as error:
        return _answer(Refusal(error.status_code, str(error.detail), wanted="a JSON body", do="see /docs"))
    except ClientDisconnect:
        return Response(status_code=400)  # for the metrics: no client is there to read it
    except AssayError as error:
        return _answer(refusal_of(error))


class Bodies:
    """Reads the bodies of requests: ``most`` bytes each, and ``together`` bytes in memory at the same time."""

    def __init__(self, most: int, together: int) -> None:
        self._most, self._room = most, together

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Read a body, and count it until the block ends.

        Raises:
            Refusal: 408 too slow, 413 too large, 503 no room beside the bodies of other requests.
        """
        body = bytearray()
        announced = request.headers.get("content-length", "0")
        try:
            if announced.isdigit() and int(announced) > self._most:
                raise self._too_large()
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    async for chunk in request.stream():
                        self._add(body, chunk)
            except TimeoutError:
                raise Refusal(
                    408, "a body that does not come to its end", wanted=f"all of it in {BODY_SECONDS:g} s", do="resend"
                ) from None
            yield bytes(body)
        finally:
            self._room += len(body)

    def _add(self, body: bytearray, chunk: bytes) -> None:
        if len(body) + len(chunk) > self._most:
            raise self._too_large()
        if len(chunk) > self._room:
            raise Refusal(
                503, "too many large bodies at the same time", wanted="fewer", do="send it again", retry_after=1
            )
        self._room -= len(chunk)
        body += chunk

    def _too_large(self) -> Refusal:
        return Refusal(413, "a body that is too large", wanted=f"at most {self._most} bytes", do="split the request")


def _answer(refusal: Refusal) -> Response:
    """Return the response that a refusal stands for."""
    headers = SAFE_HEADERS | refusal.headers | ({"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {})
    text = json.dumps(refusal.body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    body = text.encode("utf-8", "replace")  # a request may hold unpaired surrogates, and no response can
    return Response(body, status_code=refusal.status, headers=headers, media_type="application/json")


async def not_found(request: Request, error: Exception) -> Response:
    """Answer what no route takes: an unknown path, or a method that a path does not have."""
    assert isinstance(error, HTTPException)
    do = "see /docs for the paths of the service and their methods"
    refusal = Refusal(error.status_code, f"{request.method} {request.url.path}", wanted="a call of the API", do=do)
    response = _answer(refusal)
    response.headers.update(error.headers or {})
    return response


def _says_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _parsed(body: bytes) -> Any:
    """Parse a JSON body. Numbers that are not finite are for the fields to refuse: a distance may be NaN."""
    try:
        return json.loads(body.decode(), object_pairs_hook=_unique)
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise Refusal(
        422,
        f"a body that is not JSON: {reason}",
        wanted="one JSON value in UTF-8, every key once",
        do="correct it",
        fields={"errors": [{"loc": ["body"], "msg": reason, "type": "json_invalid"}]},
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _malformed(error: RequestValidationError, request: Request) -> Refusal:
    # Without the offending input: it may be long, secret, or NaN, which has no form in JSON.
    found = [{"loc": list(e["loc"]), "msg": e["msg"], "type": e["type"]} for e in error.errors()]
    first = found[0] if found else {"loc": [], "msg": "malformed"}
    where = ".".join(str(part) for part in first["loc"])
    wanted, do = "a body as in /docs", "correct it"
    if first["loc"][:1] == ["body"] and not _says_json(request):
        wanted, do = "a JSON body that is announced as one", "send the header Content-Type: application/json"
    return Refusal(422, f"{where}: {first['msg']}", wanted=wanted, do=do, fields={"errors": found[:20]})
