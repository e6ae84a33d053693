"""Receipts of responses: one request, a list, a file for ``assay poc replay``, and deletion."""

import hashlib
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse, StreamingResponse

from assay.errors import AssayError
from assay.poc.net.refusals import Refusal
from assay.poc.net.routes import Keys, Scope, needs, problems, route_class
from assay.poc.protocol.round import MAX_NONCE
from assay.poc.responses.receipts import ReceiptFooter
from assay.poc.responses.sampling import HIGHEST_INDEX
from assay.poc.service.bodies import DeletedReceipts, ReceiptList, RequestReceipts
from assay.poc.service.controller import Controller
from assay.poc.service.receipt_store import Page

log = structlog.get_logger("assay.receipts")

RECEIPTS_PREFIX = "/api/v1/receipts"
MOST_FILES = 8  # files that are streamed at the same time
READ, CONTROL = needs(Scope.READ), needs(Scope.CONTROL)

After = Annotated[int, Query(ge=0, le=MAX_NONCE)]
Index = Annotated[int | None, Query(ge=0, le=HIGHEST_INDEX)]
RequestId = Annotated[str | None, Query(min_length=1, max_length=1024)]


def receipts_router(controller: Controller, keys: Keys) -> APIRouter:
    """Return the routes of receipts."""
    calls = _Calls(controller)
    router = APIRouter(prefix=RECEIPTS_PREFIX, tags=["receipts"], route_class=route_class(controller, keys))
    router.get("", response_model=ReceiptList, responses=problems(422, 503), openapi_extra=READ)(calls.listed)
    file: dict[int | str, dict[str, Any]] = {
        200: {"content": {"application/jsonl": {}}, "description": "A complete file of receipts."},
        204: {"description": "No receipt follows."},
    }
    export = router.get(
        ".jsonl", responses=file | problems(422, 429, 503), response_class=StreamingResponse, openapi_extra=READ
    )
    export(calls.file)
    # A request id may hold slashes.
    one, refusals = "/{request_id:path}", problems(404, 422, 503)
    router.get(one, response_model=RequestReceipts, responses=refusals | problems(413), openapi_extra=READ)(
        calls.of_request
    )
    router.delete(one, response_model=DeletedReceipts, responses=refusals, openapi_extra=CONTROL)(calls.delete)
    return router


class _Calls:
    """The handlers. Those that block are plain functions, which FastAPI calls in threads."""

    def __init__(self, controller: Controller) -> None:
        self._controller, self._receipts = controller, controller.receipts
        self._streaming = 0

    def listed(self, after: After = 0, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Response:
        """Return what is stored after a sequence number, oldest first, without the receipts themselves."""
        found = self._receipts.store.listed(after, limit + 1)
        following = found[limit - 1]["seq"] if len(found) > limit else None
        return JSONResponse({"receipts": found[:limit], "next": following})

    def of_request(self, request_id: str, index: Index = None) -> Response:
        """Return the receipts of a request: of each of its choices, or of one."""
        found = self._receipts.store.of_request(request_id, index)
        return Response(f'{{"receipts":[{",".join(found)}]}}', media_type="application/json")

    def delete(self, request_id: str, index: Index = None) -> Response:
        """Delete the receipts of a request: of each of its choices, or of one."""
        return JSONResponse({"deleted": self._receipts.delete(request_id, index)})

    async def file(
        self, after: After = 0, limit: Annotated[int, Query(ge=1, le=10_000)] = 1000, request_id: RequestId = None
    ) -> Response:
        """Return receipts after a sequence number as a complete file, which ``assay poc replay`` reads.

        The file ends before a receipt of another header, and before 32 MiB. ``Receipts-Last`` is the ``after`` of the
        next one, and ``Receipts-More`` says whether there is one now.
        """
        page = await self._controller.call(self._receipts.store.page, after, limit, request_id=request_id)
        headers = {"receipts-last": str(page.chunks[-1]), "receipts-more": str(page.more).lower()}
        if page.header is None:
            return Response(status_code=204, headers=headers)
        if self._streaming >= MOST_FILES:
            seen = f"{MOST_FILES} files of receipts are being sent"
            raise Refusal(429, seen, wanted="fewer at once", do="send it again later", retry_after=5)
        lines = self._lines(page, request_id)
        await anext(lines)  # counts this file before another request is looked at: nothing is waited for here
        return StreamingResponse(lines, media_type="application/jsonl", headers=headers)

    async def _lines(self, page: Page, request_id: str | None) -> AsyncIterator[str]:
        """Yield the file, a part at a time. Without its footer, which is missing where reading fails, it is no file."""
        self._streaming += 1
        digest, count, tokens = hashlib.sha256(), 0, 0
        try:
            yield ""  # taken by file()
            yield f"{page.header}\n"
            for low, high in pairwise(page.chunks):
                found = await self._controller.call(self._receipts.store.lines, low, high, request_id=request_id)
                text = "".join(f"{line}\n" for _, line in found)
                digest.update(text.encode())
                count, tokens = count + len(found), tokens + sum(number for number, _ in found)
                yield text
            # How long the responses took is not stored.
            yield f"{ReceiptFooter(receipts=count, tokens=tokens, seconds=0.0, sha256=digest.hexdigest()).line()}\n"
        except AssayError as error:
            log.warning("file of receipts not finished", reason=error.seen)
        finally:
            self._streaming -= 1
