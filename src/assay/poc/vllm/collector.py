"""The serving side of sketches: they are taken from the workers while responses go on.

A response must not end for its client before its receipt is stored, and a receipt needs every sketch. Were all of them
asked for at the end, every answer would wait for a call into the engine's loop, which is answered between two steps.
So the tokens that the engine hands out are counted, a sketch is asked for once its token is there, and a response that
ends waits only where its last sketch is of the last few steps.

Calls interrupt the engine, so there are few: one asks for all sketches that are due, and is put off while no response
waits.
"""

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay.errors import ModelError, reason_of
from assay.poc.protocol.pipelines import SKETCH_EVERY, SKETCH_SIZE, sketch_steps
from assay.poc.vllm.client import call_workers

PAUSE = 0.02  # seconds between two calls
PUT_OFF = 0.1  # seconds more if no response waits
BYTES = SKETCH_SIZE * np.dtype(np.float16).itemsize  # of one sketch


@dataclass
class Followed:
    """A response that goes on: its tokens so far, its sketches, and who waits for the rest of them."""

    tokens: int = 0
    asked: int = 0
    """Number of sketches that were asked for."""
    found: bytearray = field(default_factory=bytearray)
    waiter: "asyncio.Future[None] | None" = None

    @property
    def taken(self) -> int:
        """Number of sketches that were taken."""
        return len(self.found) // BYTES

    @property
    def due(self) -> int:
        """Number of sketches that there are of its tokens."""
        return len(sketch_steps(self.tokens))

    def end(self, error: Exception | None = None) -> None:
        """Wake who waits, with an error if the workers did not answer."""
        if self.waiter is not None and not self.waiter.done():
            if error is None:
                self.waiter.set_result(None)
            else:
                self.waiter.set_exception(error)


class Collector:
    """Takes the sketches of one engine's responses.

    Args:
        llm: Engine client of vLLM, an ``AsyncLLM`` whose workers have the :class:`ResponseExtension`.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._open: dict[str, Followed] = {}
        self._due: dict[str, Followed] = {}
        self._called: dict[str, Followed] = {}
        self._forgotten: list[str] = []
        self._running: asyncio.Task[None] | None = None
        self._waits: asyncio.Event  # of the task that runs
        self._process = llm.output_processor.process_outputs
        llm.output_processor.process_outputs = self._wrapped_process

    def follow(self, name: str) -> None:
        """Count the tokens of a response that begins, by the id of its request in the engine."""
        self._open[name] = Followed()

    def forget(self, names: Iterable[str]) -> None:
        """Drop responses, here and with the next call in the workers."""
        for name in names:
            self._due.pop(name, None)
            if self._open.pop(name, None) is not None:
                self._forgotten.append(name)

    async def take(self, lengths: dict[str, int]) -> dict[str, NDArray[np.float16]]:
        """Return the sketches [S, 12] of responses that have ended, whose numbers of tokens are given, and forget them.

        Sketches that the workers lack are missing at the end.

        Raises:
            ModelError: The workers did not answer.
        """
        waiters = []
        for name, tokens in lengths.items():
            followed = self._open[name]
            followed.tokens = tokens
            if followed.taken < followed.due:
                followed.waiter = asyncio.get_running_loop().create_future()
                waiters.append(followed.waiter)
                if followed.asked < followed.due or name not in self._called:
                    self._ask(name, followed)
                self._waits.set()
        try:
            await asyncio.gather(*waiters)
            return {
                name: np.frombuffer(self._open[name].found, np.float16).reshape(-1, SKETCH_SIZE) for name in lengths
            }
        finally:
            self.forget(lengths)

    def _wrapped_process(self, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Count the tokens of a step before the server sees them."""
        for output in outputs:
            followed = self._open.get(output.request_id)
            if followed is not None:
                followed.tokens += len(output.new_token_ids)
                if followed.tokens > SKETCH_EVERY * followed.asked:  # more are due, without a range for every token
                    self._ask(output.request_id, followed)
        return self._process(outputs, *args, **kwargs)

    def _ask(self, name: str, followed: Followed) -> None:
        self._due[name] = followed
        followed.asked = followed.due
        if self._running is None or self._running.done():
            self._waits = asyncio.Event()
            self._running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while self._due:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._waits.wait(), PUT_OFF)
            await self._gather()
            self._waits.clear()
            self._called, self._due = self._due, {}
            forgotten, self._forgotten = self._forgotten, []
            wanted = {name: [followed.taken, followed.due] for name, followed in self._called.items()}
            try:
                replies = await call_workers(self._llm, "assay_sketches", wanted, forgotten)
                for name, data in (item for reply in replies for item in reply.items()):
                    self._called[name].found += data
                for name, followed in self._called.items():
                    if wanted[name][1] == followed.due:  # one that ended since waits for the next call
                        followed.end()
            except Exception as error:
                reason = reason_of(error)[:300]
                failed = ModelError(f"no sketches: {reason}", wanted="workers that run", do="see the log of vLLM")
                for followed in self._called.values():
                    followed.end(failed)
            self._called = {}
            await asyncio.sleep(PAUSE)

    async def _gather(self) -> None:
        """Let the responses that end in one step come together: the server wakes them a part at a time."""
        due = -1
        while len(self._due) > due:
            due = len(self._due)
            await asyncio.sleep(0)
