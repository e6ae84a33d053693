"""Receipts of responses: a canonical line each on disk, their writer, and their routes."""

import hashlib
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from itertools import groupby, pairwise
from typing import Annotated, Any, NamedTuple

import sqlalchemy as sa
import structlog
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from typing_extensions import override

from assay.errors import AssayError, StorageError
from assay.files.jsonl import JsonObject
from assay.files.sqlite import Database
from assay.poc.net.callback_urls import check_url
from assay.poc.net.keys import Scope
from assay.poc.net.refusals import Refusal
from assay.poc.net.routes import HEAD, problems
from assay.poc.net.runtime import GroupCommit, Runtime
from assay.poc.net.shares import Shares, disk_room, fair_share
from assay.poc.protocol.checks import MAX_NONCE
from assay.poc.responses.receipts import Receipt, ReceiptFooter, ReceiptHeader, Tally
from assay.poc.responses.sampling import HIGHEST_INDEX
from assay.poc.service.outbox import Outbox
from assay.poc.service.reply_bodies import ReceiptList, StoredReceipt
from assay.poc.service.service_metrics import Metrics
from assay.poc.service.service_settings import ServiceSettings

log = structlog.get_logger("assay.receipts")

RECEIPTS_PREFIX = "/api/v1/receipts"
MOST_FILES = 8
OWN_FILES = 2  # files that are streamed at the same time, and those of one client

After = Annotated[int, Query(ge=0, le=MAX_NONCE)]
Index = Annotated[int | None, Query(ge=0, le=HIGHEST_INDEX)]
RequestId = Annotated[str | None, Query(min_length=1, max_length=1024)]
MOST_BYTES = 2**25
"""Bytes of the receipts of one answer: 32 MiB, so that no file of receipts has more tokens than may
be read.
"""

CHUNK_BYTES = 2**20  # of the lines that are read at a time
_NAME_BYTES = 16
DELETED_AT_ONCE = (
    500  # receipts that one transaction deletes: more would hold up those that are written
)
ANNOUNCED = 100  # receipts of one callback, whose ids may be long
PRUNE_EVERY = 60.0
DAY = 86_400.0
_ROOM = (2**16, 2**24)  # least and most bytes that are written to see whether there is room again

HEADER_ID = (
    "INSERT INTO receipt_headers (text) VALUES (?) "
    "ON CONFLICT (text) DO UPDATE SET text = text RETURNING id"
)
STORE = """
    INSERT INTO receipts (header_id, at, name, choice, tokens, size, finish, request_id, block_hash,
        sha256, line, client)
    SELECT :header_id, :at, :name, :choice, :tokens, :size, :finish, :request_id, :block_hash,
        :sha256, :line, :client
    WHERE NOT EXISTS (SELECT 1 FROM receipts
        WHERE name = :name AND sha256 = :sha256 AND header_id = :header_id)
    RETURNING seq"""


class NewReceipt(NamedTuple):
    """A receipt to be stored, with its line and its header's line in a file."""

    header: str
    receipt: Receipt
    line: str
    client: str | None  # who asked, and has a share of the disk; None for this machine


class Page(NamedTuple):
    """Receipts that make one file: in stored order, of one header, each choice once."""

    header: str | None  # line of their header; None without receipts
    chunks: tuple[
        int, ...
    ]  # numbers between which lines are read at a time, from that before the page to its last
    more: bool  # whether further receipts follow


class ReceiptKeeper(GroupCommit[NewReceipt, bool]):
    """Stores receipts in a thread, many in one transaction; reads and deletes them."""

    def __init__(
        self, database: Database, outbox: Outbox, settings: ServiceSettings, metrics: Metrics
    ) -> None:
        super().__init__("assay-receipts", most=settings.max_receipts)
        self.database = database
        self._outbox = outbox
        self.settings = settings
        self.metrics = metrics
        self._table = database["receipts"]
        self._c = self._table.c
        check_url(settings.receipt_callback_url, allow_private=settings.allow_private_callbacks)
        self._attempted = 0
        self._pruned_at = float("-inf")
        self._journal_owed = not database.empty_journal()
        self._tidying = threading.Lock()
        self._counting = threading.Lock()
        sums = sa.select(self._c.client, sa.func.sum(self._c.size)).group_by(self._c.client)
        stored = database.rows(sums.where(self._c.client.is_not(None)))
        # Bytes on disk by client.
        self._stored: Counter[str | None] = Counter(dict(map(tuple, stored)))
        metrics.receipts_failing.set_function(lambda: float(self.failing))

    def sink(self, header: ReceiptHeader) -> "ReceiptSink":
        """Return where the receipts go that stand under a header in a file."""
        return ReceiptSink(self, header)

    @override
    def _write(self, items: Sequence[NewReceipt]) -> list[bool]:
        """Store receipts in one transaction; return of each whether it is new.

        A receipt that is stored already, byte for byte and under the same header, is not stored
        twice.
        """
        self._attempted = sum(len(item.line) for item in items)
        now = time.time()
        with self.database.write() as connection:
            headers = {
                text: connection.exec_driver_sql(HEADER_ID, (text,)).scalar_one()
                for text in {item.header for item in items}
            }
            rows = [_row(item, headers[item.header], now) for item in items]
            numbers = [connection.exec_driver_sql(STORE, row).scalar() for row in rows]
            stored = [(seq, row) for seq, row in zip(numbers, rows, strict=True) if seq is not None]
            if (url := self.settings.receipt_callback_url) is not None:
                for header, group in groupby(stored, key=lambda pair: pair[1]["header_id"]):
                    self._outbox.announce(
                        connection,
                        None,
                        url,
                        [seq for seq, _ in group],
                        interval=self.settings.callback_interval,
                        most=min(self.settings.callback_nonces, ANNOUNCED),
                        header=header,
                    )
        self._count(+1, [(row["client"], row["size"]) for _, row in stored])
        self.metrics.receipts.labels("new").inc(len(stored))
        self.metrics.receipts.labels("repeated").inc(len(items) - len(stored))
        return [seq is not None for seq in numbers]

    def _count(self, sign: int, rows: Iterable[tuple[str | None, int]]) -> None:
        """Count bytes of clients that are on the disk, or no longer."""
        with self._counting:
            for client, size in rows:
                self._stored[client] += sign * size

    @override
    def _check_room(self, client: str | None, size: int) -> None:
        super()._check_room(client, size)
        stored = self._stored[client]
        free = disk_room(self.database.path.parent)
        if client is not None and stored + size > fair_share(free + stored, 0):
            raise self._refusal("those of one client have half of what its disk has free")

    @override
    def _refusal(self, seen: str) -> Refusal:
        return Refusal(
            503,
            f"no receipt can be stored: {seen}",
            wanted="space for it",
            do="send it again",
            retry_after=1,
        )

    @override
    def _rest(self, wrote: bool) -> None:
        # See whether receipts find room again, delete what is old, and leave nothing of it behind.
        if self.failing and not wrote:
            self._probe()
        due = time.monotonic() - self._pruned_at > PRUNE_EVERY
        if due and not self.prune(self.settings.receipt_days * DAY):  # otherwise there may be more
            self._pruned_at = time.monotonic()
        self.tidy()

    def _probe(self) -> None:
        """Write and delete about as many bytes as the last transaction had."""
        filler = min(max(self._attempted, _ROOM[0]), _ROOM[1])
        with self.database.write() as connection:
            connection.exec_driver_sql(
                "INSERT OR REPLACE INTO receipt_room VALUES (1, zeroblob(?))", (filler,)
            )
        with self.database.write() as connection:
            connection.exec_driver_sql("DELETE FROM receipt_room")

    def of_request(self, request_id: str, index: int | None = None) -> list[str]:
        """Return the receipts of a request, for all choices or one, as JSON with header.

        Unknown ones are refused with 404, and with 413 those that are too large for one answer.
        """
        c = self._c
        headers = self.database["receipt_headers"].c
        where = self._of(request_id, index)
        columns = (c.seq, c.at, c.sha256, headers.text, c.line)
        query = sa.select(*columns).where(headers.id == c.header_id, *where)
        sizes = sa.select(sa.func.count(), sa.func.sum(c.size)).where(*where)
        with self.database.read() as connection:
            count, size = connection.execute(sizes).one()
            if not count:
                raise _unknown()
            if size > MOST_BYTES:
                raise Refusal(
                    413,
                    f"{count} receipts of {size} bytes",
                    wanted=f"at most {MOST_BYTES} bytes in one answer",
                    do="ask for one choice with ?index=, or fetch "
                    "/api/v1/receipts.jsonl?request_id=",
                )
            return [
                f'{{"seq":{seq},"stored_at":{at!r},"sha256":"{sha256.hex()}","header":{header},"receipt":{line}}}'
                for seq, at, sha256, header, line in connection.execute(
                    query.order_by(c.choice, c.seq)
                )
            ]

    def listed(self, after: int, limit: int) -> list[JsonObject]:
        """Return facts of receipts after a sequence number, oldest first, without their lines."""
        c = self._c
        query = sa.select(
            c.seq,
            c.request_id,
            c.choice.label("index"),
            c.block_hash,
            c.tokens,
            c.finish,
            c.size,
            c.at.label("stored_at"),
            sa.func.lower(sa.func.hex(c.sha256)).label("sha256"),
        )
        rows = self.database.rows(query.where(c.seq > after).order_by(c.seq).limit(limit))
        return [dict(row._mapping) for row in rows]

    def page(self, after: int, limit: int, *, request_id: str | None = None) -> Page:
        """Return the longest run of receipts after a sequence number that fits one file."""
        c, headers = self._c, self.database["receipt_headers"].c
        query = sa.select(c.seq, c.header_id, c.name, c.choice, c.size).where(
            c.seq > after, *self._of(request_id)
        )
        chunks = [after]
        last = None
        header = None
        more = False
        responses: set[tuple[bytes, int]] = set()
        total = part = 0
        with self.database.read() as connection:
            for seq, header_id, name, choice, size in connection.execute(
                query.order_by(c.seq).limit(limit + 1)
            ):
                total += size
                begins_new_file = header not in (None, header_id) or (name, choice) in responses
                is_full = len(responses) == limit or (last is not None and total > MOST_BYTES)
                if begins_new_file or is_full:
                    more = True
                    break
                if last is not None and part + size > CHUNK_BYTES:
                    chunks.append(last)
                    part = 0
                part += size
                responses.add((name, choice))
                last = seq
                header = header_id
            line = connection.execute(sa.select(headers.text).where(headers.id == header)).scalar()
        return Page(line, (*chunks, *([] if last is None else [last])), more)

    def lines(self, low: int, high: int, *, request_id: str | None = None) -> list[tuple[int, str]]:
        """Return tokens and lines of the receipts after ``low`` up to ``high``."""
        c = self._c
        query = (
            sa.select(c.tokens, c.line)
            .where(c.seq > low, c.seq <= high, *self._of(request_id))
            .order_by(c.seq)
        )
        return [(row.tokens, row.line) for row in self.database.rows(query)]

    def delete(self, request_id: str, index: int | None = None) -> int:
        """Delete the receipts of a request or one choice; return how many, 404 for none."""
        if not (count := self._delete(*self._of(request_id, index))):
            raise _unknown()
        self.tidy()
        return count

    def prune(self, keep: float) -> int:
        """Delete some receipts older than ``keep`` seconds; return how many."""
        now = self.database.settled_time()
        c = self._c
        old = sa.select(c.seq).where(c.at < now - keep).order_by(c.at).limit(DELETED_AT_ONCE)
        return self._delete(c.seq.in_(old))

    def _delete(self, *where: sa.ColumnElement[bool]) -> int:
        with self.database.write() as connection:
            delete = self._table.delete().where(*where).returning(self._c.client, self._c.size)
            gone = [(row.client, row.size) for row in connection.execute(delete)]
            if gone:
                self._outbox.forget_receipts(connection)
        if gone:  # and is else left alone: another thread may just have set it
            self._journal_owed = True
        self._count(-1, gone)
        return len(gone)

    def tidy(self) -> None:
        """Empty the journal, which may hold deleted receipts; a reader may delay it."""
        with self._tidying:
            if self._journal_owed:
                self._journal_owed = False  # now: what is deleted meanwhile owes another time
                try:
                    if not self.database.empty_journal():
                        self._journal_owed = True
                except StorageError:
                    self._journal_owed = True

    def _of(self, request_id: str | None, index: int | None = None) -> list[sa.ColumnElement[bool]]:
        """Return the conditions on receipts of a request, or of one of its choices; none without a
        request.
        """
        where = [] if request_id is None else [self._c.name == _name(request_id)]
        return where if index is None else [*where, self._c.choice == index]


def _row(item: NewReceipt, header_id: int, at: float) -> dict[str, Any]:
    """Return what :data:`STORE` takes."""
    receipt = item.receipt
    line = item.line.encode()
    return {
        "header_id": header_id,
        "at": at,
        "name": _name(receipt.request_id),
        "choice": receipt.index,
        "tokens": len(receipt.output),
        "size": len(line),
        "finish": receipt.finish,
        "request_id": receipt.request_id,
        "block_hash": receipt.block_hash,
        "sha256": hashlib.sha256(line).digest(),
        "line": item.line,
        "client": item.client,
    }


def _name(request_id: str) -> bytes:
    """Return the hash under which the receipts of a request are found."""
    return hashlib.sha256(request_id.encode("utf-8", "surrogatepass")).digest()[:_NAME_BYTES]


def _unknown() -> Refusal:
    return Refusal(
        404,
        "no such receipt",
        wanted="the id of a request whose receipts are kept",
        do="ask GET /api/v1/receipts for what is kept",
    )


class ReceiptSink:
    """Where receipts of one header go. :meth:`ReceiptKeeper.sink` makes it."""

    def __init__(self, keeper: ReceiptKeeper, header: ReceiptHeader) -> None:
        self._keeper = keeper
        self._header = header
        self._header_line = header.line()
        self.check = keeper.check
        """Refuse a request whose receipt could not be stored now. Call it before the engine works.
        """

    async def store(self, receipt: Receipt, *, client: str | None = None) -> None:
        """Store a receipt; it is on disk when this returns, before its response may end.

        ``client`` is who asked: of the disk and of the receipts that wait for it, each has a share.
        A prompt is stored as a hash unless the setting ``receipt_prompts`` is on. The receipt is
        stored even if the wait for it ends.

        Raises:
            Refusal: 503, the disk takes nothing, too many receipts wait for it, or the service is
                ending.
            UsageError: It cannot stand under this header in a file.
        """
        stored = receipt if self._keeper.settings.receipt_prompts else receipt.without_prompt()
        line = stored.line()
        Tally(self._header).add(stored, line)
        try:
            await self._keeper.put(
                NewReceipt(self._header_line, stored, line, client), size=len(line), client=client
            )
        except Refusal:
            self._keeper.metrics.receipts_refused.inc()
            raise


def receipts_router(
    runtime: Runtime, receipts: ReceiptKeeper, kind_of_route: type[APIRoute]
) -> APIRouter:
    """Return the routes of receipts; blocking handlers are plain functions, run in threads."""
    router = APIRouter(prefix=RECEIPTS_PREFIX, tags=["receipts"], route_class=kind_of_route)
    path_of_request = "/{request_id:path}"  # a request id may hold slashes
    export: dict[int | str, dict[str, Any]] = {
        200: {"content": {"application/jsonl": {}}, "description": "A complete file of receipts."},
        204: {"description": "No receipt follows."},
    }
    streaming = Shares(MOST_FILES, OWN_FILES)

    @router.get(
        "", response_model=ReceiptList, responses=problems(422, 503), openapi_extra=Scope.READ.extra
    )
    def listed(after: After = 0, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Response:
        """Return the facts of stored receipts after a sequence number, oldest first."""
        listed_receipts = receipts.listed(after, limit + 1)
        following = listed_receipts[limit - 1]["seq"] if len(listed_receipts) > limit else None
        return JSONResponse({"receipts": listed_receipts[:limit], "next": following})

    @router.get(
        ".jsonl",
        responses=export | problems(422, 429, 503),
        response_class=StreamingResponse,
        openapi_extra=Scope.READ.extra,
    )
    async def file(
        request: Request,
        after: After = 0,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
        request_id: RequestId = None,
    ) -> Response:
        """Return receipts after a sequence number as a file for ``assay poc replay``.

        The file ends before a receipt of another header, and before 32 MiB. ``Receipts-Last`` is
        the ``after`` of the next one, and ``Receipts-More`` says whether there is one now.
        """
        page = await runtime.call(receipts.page, after, limit, request_id=request_id)
        headers = {"receipts-last": str(page.chunks[-1]), "receipts-more": str(page.more).lower()}
        if page.header is None or HEAD in request.scope:
            status = 204 if page.header is None else 200
            return Response(status_code=status, headers=headers, media_type="application/jsonl")
        lines = file_lines(request.state.client, page, request_id)
        # Counts this file before another request is looked at: nothing is waited for here.
        await anext(lines)
        return StreamingResponse(lines, media_type="application/jsonl", headers=headers)

    async def file_lines(
        client: str | None, page: Page, request_id: str | None
    ) -> AsyncIterator[str]:
        """Yield the file in parts; a file whose reading fails has no footer."""
        digest = hashlib.sha256()
        count = 0
        tokens = 0
        with streaming.held(client, "files of receipts", do="send it again later", retry_after=5):
            yield ""  # taken by file()
            yield f"{page.header}\n"
            for low, high in pairwise(page.chunks):
                try:
                    numbered_lines = await runtime.call(
                        receipts.lines, low, high, request_id=request_id
                    )
                except AssayError as error:
                    log.warning("file of receipts not finished", reason=error.seen)
                    return
                text = "".join(f"{line}\n" for _, line in numbered_lines)
                digest.update(text.encode())
                count += len(numbered_lines)
                tokens += sum(number for number, _ in numbered_lines)
                yield text
            # How long the responses took is not stored.
            footer = ReceiptFooter(
                receipts=count, tokens=tokens, seconds=0.0, sha256=digest.hexdigest()
            )
            yield f"{footer.line()}\n"

    @router.get(
        path_of_request,
        response_model=dict[str, list[StoredReceipt]],
        responses=problems(404, 413, 422, 429, 503),
        openapi_extra=Scope.READ.extra,
    )
    async def of_request(request: Request, request_id: str, index: Index = None) -> Response:
        """Return the receipts of a request: of each of its choices, or of one."""
        parts = answer_parts(request.state.client, request_id, index)
        await anext(parts)
        return StreamingResponse(parts, media_type="application/json")

    async def answer_parts(
        client: str | None, request_id: str, index: int | None
    ) -> AsyncIterator[str]:
        """Yield the answer in parts; until all are read it counts as a file."""
        with streaming.held(client, "files of receipts", do="send it again later", retry_after=5):
            lines = await runtime.call(receipts.of_request, request_id, index)
            yield ""  # taken by of_request()
            yield '{"receipts":['
            for place, line in enumerate(lines):
                yield f",{line}" if place else line
            yield "]}"

    @router.delete(
        path_of_request,
        response_model=dict[str, int],
        responses=problems(404, 422, 503),
        openapi_extra=Scope.CONTROL.extra,
    )
    def delete(request_id: str, index: Index = None) -> Response:
        """Delete the receipts of a request: of each of its choices, or of one."""
        return JSONResponse({"deleted": receipts.delete(request_id, index)})

    return router
