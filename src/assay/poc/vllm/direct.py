"""The direct path as the serving side sees it: how many nonces a call into the workers may hold, and when.

While a call runs the engine schedules nothing, so chat that arrives waits for it. The length of a call therefore
follows from the measured time per nonce and the time that chat may wait, and with chat there are no calls: its nonces
are requests.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

from assay.poc.vllm.throttle import Throttle

CALLS = 2
"""Calls at once: the second one is queued behind the first, so that no device waits for it. Chat waits for both."""

FOLLOWS = 0.005
"""Seconds in which the next call follows if there is one; its reply has the values of the one before."""

MOST = 256  # nonces of a call for each engine
FAILURES = 3
"""Calls that fail one after the other until all nonces are requests."""


@dataclass(eq=False)
class Pace:
    """How nonces of one length are dealt out to calls.

    A call has few sizes: below a whole pass those of two significant bits, above it whole passes. The first pass of a
    size is slow, because kernels are chosen for it, so its time says nothing.

    Args:
        batch: Nonces of one pass of all engines; 0 where nonces must be requests.
        seconds: Measured time per nonce; 0 before the first call.
        nonces: Nonces of the last call.
        tried: Sizes of which a call has run.
    """

    batch: int
    seconds: float = 0.0
    nonces: int = 0
    tried: set[int] = field(default_factory=set)

    def next(self, seconds: float, most: int) -> int:
        """Return the nonces of a call that may last so many seconds: 1 at least, at most twice those of the last."""
        fitting = int(seconds / self.seconds) if self.seconds else 1
        count = max(1, min(fitting, most, 2 * max(1, self.nonces)))
        unit = self.batch if count >= self.batch else 1 << max(0, count.bit_length() - 2)
        return count - count % unit

    def ran(self, count: int, seconds: float) -> None:
        """Learn from a call of a size that :meth:`next` has given."""
        if count in self.tried or not self.seconds:
            self.seconds = seconds / count
        self.tried.add(count)
        self.nonces = count


class DirectPath:
    """Admits calls of whole batches to the workers, and remembers what became of them.

    Args:
        throttle: Throttle of the requests, which knows the chat in the engine.
        call: Function that calls a method of every worker and returns their replies.
        engines: Number of data-parallel engines. Each call goes to all of them, with an equal share for each.
    """

    def __init__(self, throttle: Throttle, call: Callable[..., Awaitable[list[Any]]], engines: int = 1) -> None:
        self.reason: str | None = "no round has begun"
        """Why the nonces of the last stream were requests even without chat; None where they were not."""
        self.in_flight = 0
        """Nonces in calls now."""
        self.nonces = self.calls = 0
        self.most = MOST * engines
        """Nonces of a call at most."""
        self._engines = engines
        self._throttle, self._call = throttle, call
        self._paces: dict[int, Pace] = {}
        self._running = self._failures = 0
        self._names = count()
        self._waiting: dict[str, asyncio.Future[list[dict[str, Any]]]] = {}
        self._asked: set[asyncio.Future[list[Any]]] = set()
        self._left = asyncio.Event()

    async def open(self, key: str, seq_len: int) -> Pace:
        """Prepare the workers for the calls of a stream; return the pace of nonces of its length."""
        if self._throttle.settings.path == "requests":
            self.reason = "ASSAY_VLLM_PATH=requests"
            return Pace(0)
        own = self._throttle.settings.forward == "assay"  # whose nonces cannot be requests
        if self._failures >= FAILURES and not own:
            return Pace(0)  # the reason stays that of the last failure
        replies = await self._call("assay_batch", key)
        self.reason = next((reply["reason"] for reply in replies if reply["reason"]), None)
        pace = self._paces.setdefault(seq_len, Pace(0))
        pace.batch = 0 if self.reason else min(reply["batch"] for reply in replies) * self._engines
        return pace

    async def admit(self, pace: Pace) -> int:
        """Wait until a call may begin; return its number of nonces, or 0 if the next nonce must be a request.

        The caller runs so many nonces, and calls :meth:`leave` when they have run or were given up.
        """
        while self._may_call(pace) and self._running >= CALLS:
            self._left.clear()
            await self._left.wait()
        if not self._may_call(pace):
            return 0
        settings = self._throttle.settings
        most = min(self.most, max(1, settings.in_flight // CALLS)) if settings.in_flight else self.most
        count = pace.next(settings.wait / CALLS, most)
        self._running += 1
        self.in_flight += count
        return count

    def leave(self, count: int) -> None:
        """Count a call of so many nonces as ended."""
        self._running -= 1
        self.in_flight -= count
        self._throttle.look()
        self._left.set()

    async def run(self, key: str, pace: Pace, nonces: list[int], *, admitted: int) -> list[dict[str, Any]]:
        """Run nonces in the workers, and return the replies that have values; none if they did not run.

        ``admitted`` is the size of the call that :meth:`admit` gave, 0 where it was not asked. A call that has fewer
        nonces, because its stream ends, says nothing about the next one, and none may follow it.
        """
        is_whole, name = len(nonces) == admitted, f"{key} {next(self._names)}"
        waiting = self._waiting[name] = asyncio.get_running_loop().create_future()
        shares = [nonces[engine :: self._engines] for engine in range(self._engines)]
        try:
            await self._ask("assay_pass", name, key, shares, pace.batch // self._engines, not is_whole)
            while not waiting.done():
                others = set(self._asked)
                timeout = None if others else FOLLOWS
                await asyncio.wait({waiting, *others}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if not (others or self._asked or waiting.done()):
                    await self._ask("assay_flush")
                    if not waiting.done():
                        waiting.set_result([{"error": "the workers do not know the call"}])
        finally:
            del self._waiting[name]
        replies = waiting.result()
        failed = next((reply["error"] for reply in replies if "error" in reply), None)
        if failed is None:
            self._failures, self.reason = 0, None
            self.calls += 1
            self.nonces += len(nonces)
            found = [reply for reply in replies if "values" in reply]
            if is_whole:
                pace.ran(admitted, max((reply["seconds"] for reply in found), default=0.0))
            return found
        self._failures += 1
        self.reason = failed
        return []

    async def _ask(self, method: str, *args: Any) -> None:
        """Call a method of every worker, and hand what it returns to the calls that wait for it.

        A call that is given up does not take along the values of another one, which are in its reply.
        """
        asking = asyncio.ensure_future(self._call(method, *args))
        self._asked.add(asking)
        asking.add_done_callback(self._settle)
        await asyncio.shield(asking)

    def _settle(self, asked: "asyncio.Future[list[Any]]") -> None:
        self._asked.discard(asked)
        if asked.cancelled() or asked.exception() is not None:
            return
        found: dict[str, list[dict[str, Any]]] = {}
        for reply in chain.from_iterable(asked.result()):
            found.setdefault(reply["call"], []).append(reply)
        for name, replies in found.items():
            if name in self._waiting and not self._waiting[name].done():
                self._waiting[name].set_result(replies)

    def describe(self) -> dict[str, Any]:
        """Return what the engine's route shows: whether nonces run so now, why not, and how many did."""
        now = self.reason is None and self._quiet()
        return {"now": now, "reason": self.reason, "calls": self.calls, "nonces": self.nonces}

    def _may_call(self, pace: Pace) -> bool:
        self._throttle.look()
        allowed = self._throttle.settings.path == "auto" and self._failures < FAILURES
        return pace.batch > 0 and allowed and self._quiet()

    def _quiet(self) -> bool:
        """Return whether no chat waits, nor is any to be expected: in exclusive mode no new one comes."""
        throttle = self._throttle
        return not (throttle.chat if throttle.settings.mode == "exclusive" else throttle.busy)
