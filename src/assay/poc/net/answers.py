"""Answers to requests that are refused, and headers of every answer."""

import json

from fastapi import Request, Response
from starlette.exceptions import HTTPException

from assay.poc.net.refusals import Refusal

SAFE_HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
"""Headers of every answer: no cache keeps it, and no browser takes it for another type than it
says.
"""


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
