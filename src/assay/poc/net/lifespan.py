"""What runs beside an application, from its start to its end."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any, Protocol

import structlog

from assay.poc.service.metrics import Exported

log = structlog.get_logger("assay.server")

PAUSE = 1.0  # seconds before a loop that failed begins again


class Served(Protocol):
    """What works behind an application, and loads its model in the background."""

    closing: threading.Event
    """Set when the end begins, while connections are still open."""

    ended: bool
    """Whether no thread of it computes any more."""

    @property
    def metrics(self) -> Exported:
        """Its figures, those of connections among them."""

    @property
    def loaded(self) -> "Future[Any]":
        """The loaded model, or the reason why it cannot be loaded."""

    def start(self) -> None:
        """Begin to work."""

    def close(self) -> None:
        """Finish what runs, and close."""


@asynccontextmanager
async def running(
    controller: Served, refresh: Callable[[], Awaitable[None]], *loops: Callable[[], Awaitable[None]]
) -> AsyncIterator[None]:
    """Start a controller, make its first snapshot, and run loops beside it until the block ends."""
    await asyncio.to_thread(controller.start)
    await refresh()
    tasks = [asyncio.create_task(kept_running(loop)) for loop in loops]
    try:
        yield
    finally:
        controller.closing.set()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await asyncio.to_thread(controller.close)


async def kept_running(loop: Callable[[], Awaitable[None]]) -> None:
    """Run a loop until it is cancelled. Without this, one that failed would be missing in silence."""
    while True:
        try:
            await loop()
        except Exception:  # of any kind, from code that this module does not know
            log.exception("a loop failed, and begins again")
        await asyncio.sleep(PAUSE)
