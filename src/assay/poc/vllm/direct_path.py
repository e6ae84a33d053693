"""The direct path: without chat, batches of nonces run in calls, past the scheduler.

vLLM hands calls to a worker one after the other, so a call runs between two steps. While it runs
the engine schedules nothing, so chat that arrives waits for it. The size of a call therefore
follows from the measured time per nonce and the time that chat may wait. With chat there are no
calls: nonces are requests. :mod:`assay.poc.vllm.direct_passes` is what a call does in a worker.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

from assay.poc.vllm.lockstep import Lockstep
from assay.poc.vllm.rows import unpack_values
from assay.poc.vllm.throttle import TICK, Throttle

CALLS = 2
"""Calls at once: the second one is queued behind the first, so that no device waits for it. Chat
waits for both.
"""

# seconds in which the next call follows if there is one; its reply has the values of the one before
FOLLOWS = 0.005
MOST = 256  # nonces of a call for each engine
# Calls that fail one after the other until all nonces are requests.
FAILURES = 3
# Looks at engines that step though they have no nonces and no chat, until all nonces are requests:
# those of one that has died would step for good.
MOST_LOOKS = 500


@dataclass(eq=False)
class CallSizer:
    """How nonces of one length are dealt out to calls.

    A call has few sizes: below a whole pass those of two significant bits, above it whole passes.
    The first pass of a size is slow, because kernels are chosen for it, so its time says nothing.
    """

    batch: int  # nonces of one pass of all engines; 0 where nonces must be requests
    seconds: float = 0.0  # measured per nonce; 0 before the first call
    nonces: int = 0  # of the last call
    tried: set[int] = field(default_factory=set)  # sizes of which a call has run

    def next(self, seconds: float, most: int) -> int:
        """Return the number of nonces of a call of this duration: 1 to twice the last number."""
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

    ``call`` calls a method of every worker and returns their replies. Each data-parallel engine has
    an equal share.
    """

    def __init__(
        self, throttle: Throttle, call: Callable[..., Awaitable[list[Any]]], engines: int = 1
    ) -> None:
        self.reason: str | None = "no round has begun"
        """Why the nonces of the last stream were requests even without chat; None where they were
        not.
        """
        self.in_flight = 0  # nonces in calls now
        self.nonces = self.calls = 0  # that have run
        self.most = MOST * engines  # nonces of a call
        self._engines = engines
        self._throttle = throttle
        self.call = call
        self.sizers: dict[int, CallSizer] = {}
        self._running = self._failures = 0
        self._names = count()
        self._waiting: dict[str, asyncio.Future[list[dict[str, Any]]]] = {}
        self._asked: set[asyncio.Future[list[Any]]] = set()
        self._left = asyncio.Event()
        self.lockstep: Lockstep | None = None
        """Of engines that step together; None where each steps by itself."""

    async def open(self, key: str, seq_len: int) -> CallSizer:
        """Prepare the workers for the calls of a stream; return the sizer of nonces of its
        length.
        """
        if self._throttle.settings.path == "requests":
            self.reason = "ASSAY_VLLM_PATH=requests"
            return CallSizer(0)
        # A stream tries again, whatever ended the calls of the one before.
        self._failures = 0
        replies = await self.call("assay_batch", key)
        self.reason = next((reply["reason"] for reply in replies if reply["reason"]), None)
        sizer = self.sizers.setdefault(seq_len, CallSizer(0))
        sizer.batch = 0 if self.reason else min(reply["batch"] for reply in replies) * self._engines
        return sizer

    async def admit(self, sizer: CallSizer) -> int:
        """Wait until a call may begin; return its nonces, or 0 if the next must be a request.

        The caller runs so many nonces, and calls :meth:`leave` when they have run or were given up.
        """
        looks = 0
        while self._may_call(sizer):
            nonces = self._throttle.in_flight
            if self.lockstep is not None and not self.lockstep.rests(nonces):
                looks = 0 if nonces else looks + 1
                if looks > MOST_LOOKS:
                    self.reason = "engines that step together do not come to rest"
                    self._failures = FAILURES
                await asyncio.sleep(TICK)
            elif self._running >= CALLS:
                self._left.clear()
                await self._left.wait()
            else:
                break
        else:
            return 0
        settings = self._throttle.settings
        most = (
            min(self.most, max(1, settings.in_flight // CALLS)) if settings.in_flight else self.most
        )
        count = sizer.next(settings.wait / CALLS, most)
        self._running += 1
        self.in_flight += count
        return count

    def leave(self, count: int) -> None:
        """Count a call of so many nonces as ended."""
        self._running -= 1
        self.in_flight -= count
        self._throttle.look()
        self._left.set()

    async def wait_for_calls(self) -> None:
        """Wait until no call runs or is about to."""
        while self._running or self._asked:
            self._left.clear()
            await self._left.wait()

    async def run(
        self, key: str, sizer: CallSizer, nonces: list[int], *, admitted: int
    ) -> dict[int, Any]:
        """Run nonces in the workers, and return their values, none of them if they did not run.

        A call that has fewer nonces than were admitted, because its stream ends, says nothing about
        the next one, and none may follow it.
        """
        is_whole = len(nonces) == admitted
        name = f"{key} {next(self._names)}"
        waiting = self._waiting[name] = asyncio.get_running_loop().create_future()
        shares = [nonces[engine :: self._engines] for engine in range(self._engines)]
        try:
            await self._ask(
                "assay_pass", name, key, shares, sizer.batch // self._engines, not is_whole
            )
            while not waiting.done():
                others = set(self._asked)
                timeout = None if others else FOLLOWS
                await asyncio.wait(
                    {waiting, *others}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED
                )
                if not (others or self._asked or waiting.done()):
                    await self._ask("assay_flush")
                    if not waiting.done():
                        waiting.set_result([{"error": "the workers do not know the call"}])
        finally:
            del self._waiting[name]
        replies = waiting.result()
        self.reason = next((reply["error"] for reply in replies if "error" in reply), None)
        if self.reason is not None:
            self._failures += 1
            return {}
        self._failures = 0
        self.calls += 1
        self.nonces += len(nonces)
        if is_whole:
            sizer.ran(
                admitted,
                max((reply["seconds"] for reply in replies if "values" in reply), default=0.0),
            )
        return {
            nonce: values for reply in replies for nonce, values in unpack_values(reply).items()
        }

    async def _ask(self, method: str, *args: Any) -> None:
        """Call a method of every worker, and hand what it returns to the calls that wait for it.

        A call that is given up does not take along the values of another one, which are in its
        reply.
        """
        asking = asyncio.ensure_future(self.call(method, *args))
        self._asked.add(asking)
        asking.add_done_callback(self._settle)
        await asyncio.shield(asking)

    def _settle(self, call: "asyncio.Future[list[Any]]") -> None:
        self._asked.discard(call)
        self._left.set()
        if call.cancelled() or call.exception() is not None:
            return
        replies_by_call: dict[str, list[dict[str, Any]]] = {}
        for reply in chain.from_iterable(call.result()):
            replies_by_call.setdefault(reply["call"], []).append(reply)
        for name, replies in replies_by_call.items():
            if name in self._waiting and not self._waiting[name].done():
                self._waiting[name].set_result(replies)

    def describe(self) -> dict[str, Any]:
        """Return what the engine's route shows: whether nonces run so now, why not, and how many
        did.
        """
        now = self.reason is None and self._quiet()
        return {"now": now, "reason": self.reason, "calls": self.calls, "nonces": self.nonces}

    def _may_call(self, sizer: CallSizer) -> bool:
        self._throttle.look()
        allowed = self._throttle.settings.path == "auto" and self._failures < FAILURES
        return sizer.batch > 0 and allowed and self._quiet()

    def _quiet(self) -> bool:
        """Return whether no chat waits, nor is any to be expected: in exclusive mode no new one
        comes.
        """
        throttle = self._throttle
        return not (throttle.chat if throttle.settings.mode == "exclusive" else throttle.busy)
