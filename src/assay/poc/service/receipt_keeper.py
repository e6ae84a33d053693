"""Receipts of responses on their way to the disk, and how long they stay there."""

import time

from assay.poc.net.group_commit import GroupCommit
from assay.poc.net.guard import check_url
from assay.poc.net.refusals import Refusal
from assay.poc.responses.receipts import Receipt, ReceiptHeader, Tally
from assay.poc.service.database import Database
from assay.poc.service.metrics import Metrics
from assay.poc.service.outbox import Outbox
from assay.poc.service.receipt_store import NewReceipt, Receipts
from assay.poc.service.settings import Settings

ANNOUNCED = 100  # receipts of one callback, whose ids may be long
PRUNE_EVERY = 60.0
DAY = 86_400.0


class ReceiptKeeper:
    """Stores receipts in a thread of its own, many in one transaction, and deletes those that are old.

    Args:
        database: Database of the service.
        outbox: Outbox for callbacks.
        settings: Bounds, days and callback URL.
        metrics: Metrics of the service.

    Raises:
        Refusal: 422, the callback URL can never be called.
    """

    def __init__(self, database: Database, outbox: Outbox, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        if settings.receipt_callback_url is not None:
            check_url(settings.receipt_callback_url, allow_private=settings.allow_private_callbacks)
        self.store = Receipts(
            database,
            outbox,
            url=settings.receipt_callback_url,
            interval=settings.callback_interval,
            most=min(settings.callback_nonces, ANNOUNCED),
        )
        self._group: GroupCommit[NewReceipt, bool] = GroupCommit(
            "assay-receipts", write=self._write, rest=self._rest, refusal=_busy, most=settings.max_receipts
        )
        self._lost = 0
        self._pruned_at = float("-inf")
        self._metrics.receipts_failing.set_function(lambda: float(self._group.failing))

    def start(self) -> None:
        """Start the thread."""
        self._group.start()

    def close(self) -> None:
        """Store what waits, and end the thread."""
        self._group.close()

    def sink(self, header: ReceiptHeader) -> "ReceiptSink":
        """Return where the receipts go that stand under a header in a file."""
        return ReceiptSink(self._group, header, self._settings, self._metrics)

    def delete(self, request_id: str, index: int | None = None) -> int:
        """Delete the receipts of a request, or of one of its choices; return how many.

        Raises:
            Refusal: 404, no such receipt.
            StorageError: The file cannot be written.
        """
        count = self.store.delete(request_id, index)
        self._metrics.receipts_deleted.labels("request").inc(count)
        return count

    def _write(self, receipts: list[NewReceipt]) -> list[bool]:
        started = time.perf_counter()
        self._lost = sum(receipt.size for receipt in receipts)
        fresh = self.store.add(receipts)
        self._lost = 0
        self._metrics.receipt_seconds.observe(time.perf_counter() - started)
        self._metrics.receipts.labels("new").inc(sum(fresh))
        self._metrics.receipts.labels("repeated").inc(len(fresh) - sum(fresh))
        return fresh

    def _rest(self, wrote: bool) -> None:
        """See whether the disk has room again, delete what is old, and leave nothing of it behind."""
        if self._group.failing and not wrote:
            self.store.probe(self._lost)
        if time.monotonic() - self._pruned_at > PRUNE_EVERY:
            count = self.store.prune(self._settings.receipt_days * DAY)
            self._metrics.receipts_deleted.labels("age").inc(count)
            if not count:  # otherwise there may be more
                self._pruned_at = time.monotonic()
        self.store.tidy()


class ReceiptSink:
    """Where receipts of one header go. :meth:`ReceiptKeeper.sink` makes it."""

    def __init__(
        self, group: GroupCommit[NewReceipt, bool], header: ReceiptHeader, settings: Settings, metrics: Metrics
    ) -> None:
        self._group, self._header, self._settings, self._metrics = group, header, settings, metrics
        self._header_line = header.line()

    def check(self) -> None:
        """Refuse a request whose receipt could not be stored now. Call it before the engine works.

        Raises:
            Refusal: 503, the disk takes nothing, too many receipts wait for it, or the service is ending.
        """
        self._group.check()

    async def store(self, receipt: Receipt) -> None:
        """Store a receipt; it is on disk when this returns. A response may not be complete before that.

        A prompt is stored as a hash unless the setting ``receipt_prompts`` is on. The receipt is stored even if the
        wait for it is cancelled.

        Raises:
            Refusal: 503, the disk takes nothing, too many receipts wait for it, or the service is ending.
            UsageError: It cannot stand under this header in a file.
        """
        kept = receipt if self._settings.receipt_prompts else receipt.without_prompt()
        line = kept.line()
        Tally(self._header).add(kept, line)
        row = NewReceipt(
            header=self._header_line,
            request_id=kept.request_id,
            index=kept.index,
            block_hash=kept.block_hash,
            tokens=len(kept.output),
            finish=kept.finish,
            line=line,
        )
        try:
            await self._group.put(row, size=row.size)
        except Refusal:
            self._metrics.receipts_refused.inc()
            raise


def _busy(seen: str) -> Refusal:
    return Refusal(503, f"no receipt can be stored: {seen}", wanted="room", do="send it again", retry_after=1)
