"""Messages on their way to the disk: all that wait share a transaction."""

import time
from collections.abc import Sequence

from assay.poc.net.group_commit import GroupCommit
from assay.poc.net.refusals import Refusal
from assay.poc.validator.inbox import Inbox, Message
from assay.poc.validator.metrics import Metrics

PRUNE_EVERY = 5.0


class Writer:
    """Keeps messages, in a thread of its own.

    Args:
        inbox: Inbox that this thread alone adds to.
        metrics: Metrics of the validator.
        most: Messages that wait at the same time; more are refused.
        keep: Seconds for which messages are kept.
    """

    def __init__(self, inbox: Inbox, metrics: Metrics, *, most: int, keep: float) -> None:
        self._inbox, self._metrics, self._keep = inbox, metrics, keep
        self._pruned = time.monotonic()
        self._group: GroupCommit[Message, bool] = GroupCommit(
            "assay-inbox", write=self._write, rest=self._rest, refusal=busy, most=most
        )

    def start(self) -> None:
        """Start the thread."""
        self._group.start()

    async def keep(self, message: Message) -> bool:
        """Keep a message; return whether it is new. It is on disk when this returns.

        Raises:
            Refusal: 429, so much of this node is kept already; 503, too many messages wait, or the disk takes nothing.
        """
        if self._inbox.is_full(message.public_key, len(message.body)):
            raise Refusal(
                429,
                "so many bytes of this node are kept that there is no room for more",
                wanted="the room of one node (--max-kept of the validator)",
                do="send it again later: what is older than --keep is deleted",
                retry_after=60,
                fields={"fields": ["room"]},
            )
        return await self._group.put(message, size=len(message.body))

    def close(self) -> None:
        """Keep what waits, and end the thread."""
        self._group.close()

    @property
    def failing(self) -> bool:
        """Whether nothing can be written now."""
        return self._group.failing

    @property
    def error(self) -> str | None:
        """Fault of the code that kept the last messages from being written, if there was one."""
        return self._group.error

    def _write(self, messages: Sequence[Message]) -> list[bool]:
        started = time.perf_counter()
        fresh = self._inbox.add(messages)
        self._metrics.commit_seconds.observe(time.perf_counter() - started)
        self._metrics.commit_messages.observe(len(messages))
        for message, new in zip(messages, fresh, strict=True):
            self._metrics.messages.labels(message.kind, "new" if new else "repeated").inc()
        return fresh

    def _rest(self, wrote: bool) -> None:
        if not wrote:  # what adds messages ends epochs as well
            self._inbox.roll()
        if time.monotonic() - self._pruned > PRUNE_EVERY:
            self._inbox.prune(self._keep)
            self._pruned = time.monotonic()


def busy(seen: str) -> Refusal:
    """Return the refusal of a message that cannot be kept now."""
    return Refusal(503, seen, wanted="room", do="send it again", retry_after=1, fields={"fields": ["busy"]})
