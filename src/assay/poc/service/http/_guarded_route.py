"""What every route of ours does around its handler: key, body size, errors, metrics.

It lives in the route, not in a middleware, so that mounting our router leaves the other routes of an application
as they are.
"""

import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from assay.errors import AssayError
from assay.poc.service._refusals import Refusal, refusal_of
from assay.poc.service.http._auth import Keys, Scope
from assay.poc.service.runtime import Controller

__all__ = ["needs", "route_class"]

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def needs(scope: Scope) -> dict[str, Any]:
    """Return the ``openapi_extra`` of a route that needs a scope; :func:`route_class` reads it."""
    return {"security": [{"bearer": []}], "x-scope": str(scope)}


def route_class(controller: Controller, keys: Keys) -> type[APIRoute]:
    """Return the class of our routes for one controller."""

    class Route(APIRoute):
        def get_route_handler(self) -> Handler:
            inner = super().get_route_handler()
            scope = (self.openapi_extra or {}).get("x-scope")
            path = self.path_format

            async def handle(request: Request) -> Response:
                started = time.perf_counter()
                try:
                    if scope is not None:
                        keys.check(request.headers.get("authorization"), Scope(scope))
                    await _read_body(request, controller.settings.max_body)
                    response = await inner(request)
                except RequestValidationError as error:
                    response = _answer(_malformed(error))
                except HTTPException as error:
                    response = _answer(
                        Refusal(error.status_code, str(error.detail), wanted="a JSON body", do="see /docs")
                    )
                except AssayError as error:
                    response = _answer(refusal_of(error))
                controller.metrics.requests.labels(path, str(response.status_code)).inc()
                controller.metrics.request_seconds.labels(path).observe(time.perf_counter() - started)
                return response

            return handle

    return Route


async def _read_body(request: Request, most: int) -> None:
    """Read the body, at most ``most`` bytes of it; the handler finds it where it would have put it."""
    announced = request.headers.get("content-length", "0")
    size = int(announced) if announced.isdigit() else 0
    chunks: list[bytes] = []
    total = 0
    if size <= most and request.method not in ("GET", "HEAD"):
        async for chunk in request.stream():
            total += len(chunk)
            if total > most:
                break
            chunks.append(chunk)
        request._body = b"".join(chunks)
    if max(total, size) > most:
        raise Refusal(
            413,
            "a body that is too large",
            wanted=f"at most {most} bytes",
            do="split the request",
        )


def _malformed(error: RequestValidationError) -> Refusal:
    # Without the offending input: it may be long, secret, or NaN, which has no form in JSON.
    found = [{"loc": list(e["loc"]), "msg": e["msg"], "type": e["type"]} for e in error.errors()]
    first = found[0] if found else {"loc": [], "msg": "malformed"}
    where = ".".join(str(part) for part in first["loc"])
    return Refusal(
        422, f"{where}: {first['msg']}", wanted="a body as in /docs", do="correct it", fields={"errors": found[:20]}
    )


def _answer(refusal: Refusal) -> JSONResponse:
    headers = refusal.headers | ({"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {})
    return JSONResponse(_printable(refusal.body), status_code=refusal.status, headers=headers)


def _printable(value: Any) -> Any:
    """Replace unpaired surrogates, which a request may hold and no response can."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_printable(name): _printable(item) for name, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, (list, tuple)) else value
