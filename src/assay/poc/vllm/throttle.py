"""The throttle: fills an idle engine with nonces, and beside chat admits a few at a time.

A nonce that runs beside chat makes each step longer by its own tokens. The throttle therefore
bounds how many nonces are inside the engine and, while there is chat, the part of the time in which
any is: the ``share``.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from assay.settings import Settings

Mode = Literal["chat-first", "exclusive"]
NoncePath = Literal["auto", "requests"]
"""How nonces run while there is no chat: as whole batches inside the workers where that can be, or
as requests.
"""

MOST = 1_000_000
Amount = Annotated[float, Field(ge=0, lt=MOST)]

# seconds between two looks at the engine's chat; vLLM announces neither its beginning nor its end
TICK = 0.02
# Seconds over which the speed of an engine without chat is measured.
WINDOW = 0.25


class ThrottleSettings(Settings):
    """What Proof of Compute may take of an engine that also serves chat. Times are in seconds.

    A change of ``path`` holds from the next round on.

    Raises:
        UsageError: A value is out of range.
    """

    mode: Mode = Field(
        "chat-first", description="Whether chat goes first, or a round has the engine to itself."
    )
    share: float = Field(
        0.25, gt=0, le=1, description="Part of the time that nonces may run while there is chat."
    )
    chat_in_flight: int = Field(2, ge=1, lt=MOST, description="Nonces at once while there is chat.")
    in_flight: int = Field(
        0, ge=0, lt=MOST, description="Nonces at once without chat; 0 measures and adapts."
    )
    wait: Amount = Field(
        0.1,
        description="Time that the first chat request on an idle engine may wait for the nonces "
        "inside.",
    )
    quiet: Amount = Field(
        1.0, description="Time after the last chat until the engine counts as idle."
    )
    drain: Amount = Field(30.0, description="Time that an exclusive round waits for running chat.")
    path: NoncePath = Field(
        "auto",
        description="How nonces run without chat: in whole batches inside the workers, or as "
        "requests.",
    )


class OperatorsThrottle(ThrottleSettings):
    """The throttle's settings, also from variables such as ``ASSAY_VLLM_SHARE``.

    Raises:
        UsageError: A value is out of range.
    """

    model_config = SettingsConfigDict(env_prefix="ASSAY_VLLM_")
    has_flags = False


class Throttle:
    """Admits nonces to one engine. It belongs to one event loop.

    ``settings`` may be replaced at any time. ``unfinished`` returns the number of requests in the
    engine, nonces included, and ``capacity`` nonces fill it.
    """

    def __init__(
        self, settings: ThrottleSettings, unfinished: Callable[[], int], capacity: int
    ) -> None:
        self.settings = settings
        self.in_flight = 0
        self._unfinished = unfinished
        self._fills = max(1, capacity)
        self._left = asyncio.Event()
        self._last_chat = -1e9
        self._burst = 0
        self._burst_began = 0.0
        self._rest_until = 0.0
        # Per pass, on an engine without chat.
        self._seconds = 0.0
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
        while not self.may_start():
            # One of them will leave, and nothing else can make room.
            if self.in_flight:
                self._left.clear()
                await self._left.wait()
            else:
                await asyncio.sleep(max(0.0, min(TICK, self._rest_until - time.monotonic())))
            self.look()
        if self.in_flight == 0:
            self._burst = 0
            self._burst_began = time.monotonic()
            self._window_began = self._burst_began
            self._window_count = 0
        self.in_flight += 1
        self._burst += 1

    def leave(self, passes: int = 1) -> None:
        """Count a nonce that has run, or was given up; one that decodes took a pass for every
        token.
        """
        self.in_flight -= 1
        self.look()
        now = time.monotonic()
        if self.in_flight == 0 and self._paces:
            self._rest_until = now + (now - self._burst_began) * (1 / self.settings.share - 1)
        self._measure(now, passes)
        self._left.set()

    async def drained(self) -> bool:
        """In exclusive mode, wait until running chat has ended; return False if that took too
        long.
        """
        deadline = time.monotonic() + self.settings.drain
        while self.settings.mode == "exclusive" and self.chat:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(TICK)
        return True

    @property
    def _paces(self) -> bool:
        return self.settings.mode == "chat-first" and self.settings.share < 1 and self.busy

    def may_start(self) -> bool:
        """Return whether one more nonce may enter the engine now."""
        if self.in_flight >= self.limit:
            return False
        if not self._paces:
            return True
        # A burst enters whole and leaves whole: between two of them the engine belongs to chat.
        if self.in_flight:
            return self._burst < self.settings.chat_in_flight
        return time.monotonic() >= self._rest_until

    def _measure(self, now: float, passes: int) -> None:
        """Take the time per pass from windows in which the engine was never empty and there was no
        chat.

        Chat waits for the passes that run, and not for the nonces: those that decode leave after
        each of their tokens.
        """
        self._window_count += passes
        if self.busy:
            self._window_began = now
            self._window_count = 0
        elif now - self._window_began >= WINDOW:
            self._seconds = (now - self._window_began) / self._window_count
            self._window_began = now
            self._window_count = 0
