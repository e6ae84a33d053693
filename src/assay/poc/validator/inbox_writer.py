"""The thread that puts messages on disk, many in one transaction."""

import time
from collections.abc import Callable, Collection

from assay.poc.net.refusals import Refusal
from assay.poc.net.runtime import GroupCommit
from assay.poc.validator.inbox import Inbox, Message
from assay.poc.validator.validator_metrics import ValidatorMetrics

PRUNE_EVERY = 5.0


class InboxWriter(GroupCommit[Message, bool]):
    """Keeps messages for ``keep`` seconds, in a thread of its own, which alone adds to the
    inbox.
    """

    def __init__(
        self,
        inbox: Inbox,
        metrics: ValidatorMetrics,
        *,
        most: int,
        keep: float,
        open_blocks: Callable[[], Collection[str]],
    ) -> None:
        super().__init__("assay-inbox", most=most)
        self._inbox = inbox
        self._metrics = metrics
        self._keep = keep
        self._open_blocks = open_blocks
        self._pruned = time.monotonic()

    async def keep(self, message: Message) -> bool:
        """Keep a message; return whether it is new. It is on disk when this returns.

        It is refused with 429 where so much of this node is kept already, with 503 where it cannot
        be written now.
        """
        if self._inbox.is_full(message.public_key, message.size):
            raise Refusal(
                429,
                "so many bytes of this node are kept that there is no room for more",
                wanted="the room of one node (`max_kept` under [poc.validator], and half of what "
                "its disk has free)",
                do="send it again later: what is older than `keep` is deleted",
                retry_after=60,
                fields={"fields": ["room"]},
            )
        return await self.put(message, size=message.size, client=message.public_key)

    def _write(self, messages: list[Message]) -> list[bool]:
        fresh = self._inbox.add(messages)
        for message, new in zip(messages, fresh, strict=True):
            self._metrics.messages.labels(message.kind, "new" if new else "repeated").inc()
        return fresh

    def _refusal(self, seen: str) -> Refusal:
        return Refusal(
            503,
            seen,
            wanted="room for it",
            do="send it again",
            retry_after=1,
            fields={"fields": ["busy"]},
        )

    def _rest(self, wrote: bool) -> None:
        # What adds messages ends epochs as well.
        if not wrote:
            self._inbox.roll()
        if self._inbox.is_behind or time.monotonic() - self._pruned > PRUNE_EVERY:
            self._inbox.prune(self._keep, self._open_blocks())
            self._pruned = time.monotonic()
