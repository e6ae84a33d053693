"""The throttle: it fills an idle engine with nonces, and beside chat lets in a few at a time, with rests between them.

A nonce that runs beside chat makes each step longer by its own tokens. The throttle therefore bounds how many nonces
are inside the engine and, while there is chat, the part of the time in which any is: the ``share``.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from assay.errors import UsageError

Mode = Literal["chat-first", "exclusive"]
NoncePath = Literal["auto", "requests"]
"""How nonces run while there is no chat: as whole batches inside the workers where that can be, or as requests."""

_WORDS = {"mode": get_args(Mode), "path": get_args(NoncePath)}

TICK = 0.02  # seconds between two looks at the engine's chat; vLLM announces neither its beginning nor its end
WINDOW = 0.25  # seconds over which the speed of an engine without chat is measured


@dataclass(frozen=True, kw_only=True)
class ThrottleSettings:
    """What Proof of Compute may take of an engine that also serves chat. Times are in seconds.

    :class:`assay.poc.vllm.PluginSettings` describes each of them. A change of ``path`` holds from the next round on.

    Raises:
        UsageError: A value is out of range.
    """

    mode: Mode = "chat-first"
    share: float = 0.25
    in_flight: int = 0
    chat_in_flight: int = 2
    wait: float = 0.1
    quiet: float = 1.0
    drain: float = 30.0
    path: NoncePath = "auto"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 1 if name == "chat_in_flight" else 0
            if words := _WORDS.get(name):
                fits, wanted = value in words, " or ".join(words)
            elif name == "share":
                fits, wanted = 0 < value <= 1, "a part in (0, 1]"
            else:
                fits, wanted = least <= value < 1e6, f"a number from {least} and below a million"
            if not fits:
                raise UsageError(f"{name} {value!r}", wanted=wanted, do=f"correct ASSAY_VLLM_{name.upper()}")


class Throttle:
    """Admits nonces to one engine. It belongs to one event loop.

    ``settings`` may be replaced at any time. ``unfinished`` returns the number of requests in the engine, nonces
    included, and ``capacity`` nonces fill it.
    """

    def __init__(self, settings: ThrottleSettings, unfinished: Callable[[], int], capacity: int) -> None:
        self.settings = settings
        self.in_flight = 0
        self._unfinished = unfinished
        self._fills = max(1, capacity)
        self._left = asyncio.Event()
        self._last_chat = -1e9
        self._burst = 0
        self._burst_began = 0.0
        self._rest_until = 0.0
        self._seconds = 0.0  # per pass, on an engine without chat
        self._window_began = 0.0
        self._window_count = 0

    @property
    def chat(self) -> int:
        """Number of requests in the engine that are not nonces."""
        return max(0, self._unfinished() - self.in_flight)

    @property
    def busy(self) -> bool:
        """Whether there is chat, or was at a look less than ``quiet`` seconds ago."""
        return self.chat > 0 or time.monotonic() - self._last_chat < self.settings.quiet

    @property
    def limit(self) -> int:
        """Number of nonces that may be in the engine now."""
        settings = self.settings
        most = settings.in_flight or self._fills
        if self.busy and settings.mode != "exclusive":
            return min(most, settings.chat_in_flight)
        if settings.in_flight or settings.mode == "exclusive":
            return most
        if not self._seconds:
            return min(most, 2 * settings.chat_in_flight)
        return max(settings.chat_in_flight, min(most, int(settings.wait / self._seconds)))

    def look(self) -> None:
        """Remember when there was chat; called whenever a nonce waits, enters or leaves."""
        if self.chat:
            self._last_chat = time.monotonic()

    async def admit(self) -> None:
        """Wait until one more nonce may run, and count it."""
        self.look()
        while not self._may_start():
            if self.in_flight:  # one of them will leave, and nothing else can make room
                self._left.clear()
                await self._left.wait()
            else:
                await asyncio.sleep(max(0.0, min(TICK, self._rest_until - time.monotonic())))
            self.look()
        if self.in_flight == 0:
            self._burst, self._burst_began = 0, time.monotonic()
            self._window_began, self._window_count = self._burst_began, 0
        self.in_flight += 1
        self._burst += 1

    def leave(self, passes: int = 1) -> None:
        """Count a nonce that has run, or was given up; one that decodes took a pass for every token."""
        self.in_flight -= 1
        self.look()
        now = time.monotonic()
        if self.in_flight == 0 and self._paces:
            self._rest_until = now + (now - self._burst_began) * (1 / self.settings.share - 1)
        self._measure(now, passes)
        self._left.set()

    async def drained(self) -> bool:
        """In exclusive mode, wait until running chat has ended; return False if that took too long."""
        deadline = time.monotonic() + self.settings.drain
        while self.settings.mode == "exclusive" and self.chat:
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
        if self.in_flight:  # a burst enters whole and leaves whole: between two of them the engine belongs to chat
            return self._burst < self.settings.chat_in_flight
        return time.monotonic() >= self._rest_until

    def _measure(self, now: float, passes: int) -> None:
        """Take the time per pass from windows in which the engine was never empty and there was no chat.

        Chat waits for the passes that run, and not for the nonces: those that decode leave after each of their tokens.
        """
        self._window_count += passes
        if self.busy:
            self._window_began, self._window_count = now, 0
        elif now - self._window_began >= WINDOW:
            self._seconds = (now - self._window_began) / self._window_count
            self._window_began, self._window_count = now, 0
