"""How many nonces run at once: as many as fill an idle engine, few and in turns while people chat.

A nonce that runs beside chat makes each step longer by its own tokens. What is bounded is therefore how many nonces
are inside the engine, and, while there is chat, which part of the time any is: the ``share``.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, get_args

from assay.errors import UsageError

__all__ = ["Flow", "FlowSettings", "Mode"]

Mode = Literal["chat-first", "exclusive"]

TICK = 0.005  # seconds between two looks at the engine's chat while nonces wait
WINDOW = 0.25  # seconds over which the speed of an engine without chat is measured


@dataclass(frozen=True, kw_only=True)
class FlowSettings:
    """What Proof of Compute may take of an engine that also serves. Times are in seconds.

    Args:
        mode: ``chat-first``; or ``exclusive``: a round refuses new chat, and waits for what runs to end.
        share: part of the time that nonces may run while there is chat, in (0, 1].
        in_flight: nonces at once on an engine without chat; 0 fills one step of the engine and has the next ready.
        chat_in_flight: nonces at once while there is chat.
        wait: an idle engine takes so few nonces that the first chat request waits about this long at most.
        quiet: how long after the last chat request the engine counts as idle.
        drain: how long exclusive mode waits for running chat. What is not finished then goes on beside the nonces.

    Raises:
        UsageError: a value is out of range.
    """

    mode: Mode = "chat-first"
    share: float = 0.25
    in_flight: int = 0
    chat_in_flight: int = 2
    wait: float = 0.1
    quiet: float = 1.0
    drain: float = 30.0

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise UsageError(f"mode {self.mode!r}", wanted=" or ".join(get_args(Mode)), do="correct ASSAY_VLLM_MODE")
        if not 0 < self.share <= 1:
            raise UsageError(f"share {self.share!r}", wanted="a part in (0, 1]", do="correct ASSAY_VLLM_SHARE")
        for field in fields(self):
            value = getattr(self, field.name)
            least = 1 if field.name == "chat_in_flight" else 0
            if field.name not in ("mode", "share") and not least <= value < 1e6:
                name = f"ASSAY_VLLM_{field.name.upper()}"
                raise UsageError(f"{field.name} {value!r}", wanted=f"a number from {least}", do=f"correct {name}")


class Flow:
    """Lets nonces into one engine. Lives in one event loop.

    Args:
        settings: see there.
        unfinished: returns the requests that are in the engine, nonces included.
        capacity: nonces that fill the engine.
    """

    def __init__(self, settings: FlowSettings, unfinished: Callable[[], int], capacity: int) -> None:
        self.settings = settings
        self.in_flight = 0
        self._unfinished = unfinished
        self._capacity = settings.in_flight or max(1, capacity)
        self._done = asyncio.Event()
        self._last_chat = -1e9
        self._burst = 0
        self._burst_began = 0.0
        self._rest_until = 0.0
        self._seconds = 0.0  # of one nonce on an engine without chat
        self._window_began = 0.0
        self._window_count = 0

    @property
    def chat(self) -> int:
        """Requests in the engine that are not nonces."""
        return max(0, self._unfinished() - self.in_flight)

    @property
    def busy(self) -> bool:
        """Whether there is chat, or was a moment ago."""
        now = time.monotonic()
        if self.chat:
            self._last_chat = now
        return now - self._last_chat < self.settings.quiet

    @property
    def limit(self) -> int:
        """Nonces that may be in the engine now."""
        if self.settings.mode == "exclusive":
            return self._capacity
        if self.busy:
            return min(self._capacity, self.settings.chat_in_flight)
        if not self._seconds or self.settings.in_flight:
            return self._capacity if self.settings.in_flight else min(self._capacity, 2 * self.settings.chat_in_flight)
        return max(self.settings.chat_in_flight, min(self._capacity, int(self.settings.wait / self._seconds)))

    async def admit(self) -> None:
        """Wait until one more nonce may run, and count it."""
        while not self._may_start():
            self._done.clear()
            try:
                async with asyncio.timeout(TICK):
                    await self._done.wait()
            except TimeoutError:
                pass
        if self.in_flight == 0:
            self._burst, self._burst_began = 0, time.monotonic()
            self._window_began, self._window_count = self._burst_began, 0
        self.in_flight += 1
        self._burst += 1

    def leave(self) -> None:
        """Count a nonce that has run, or was given up."""
        self.in_flight -= 1
        now = time.monotonic()
        if self.in_flight == 0 and self._paces:
            self._rest_until = now + (now - self._burst_began) * (1 / self.settings.share - 1)
        self._measure(now)
        self._done.set()

    async def drained(self) -> bool:
        """In exclusive mode, wait until running chat has ended; False where that took too long."""
        if self.settings.mode != "exclusive":
            return True
        deadline = time.monotonic() + self.settings.drain
        while self.chat:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(TICK)
        return True

    @property
    def _paces(self) -> bool:
        return self.settings.mode == "chat-first" and self.settings.share < 1 and self.busy

    def _may_start(self) -> bool:
        if self.in_flight >= self.limit:
            return False
        if not self._paces:
            return True
        if self.in_flight:  # a burst is let in whole and leaves whole: between two of them the engine is chat's
            return self._burst < self.settings.chat_in_flight
        return time.monotonic() >= self._rest_until

    def _measure(self, now: float) -> None:
        """Take the time of a nonce from windows in which the engine was never empty and nobody chatted."""
        self._window_count += 1
        if self.busy:
            self._window_began, self._window_count = now, 0
        elif now - self._window_began >= WINDOW:
            self._seconds = (now - self._window_began) / self._window_count
            self._window_began, self._window_count = now, 0
