"""One stream of nonces through an engine: admitted one by one, collected a batch at a time, returned in order."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from assay.errors import ModelError
from assay.poc.engines.vllm._client import Client
from assay.poc.engines.vllm._wire import Spec

log = logging.getLogger("assay.vllm")

AHEAD = 2  # batches that may be finished before they are asked for
ATTEMPTS = 3  # for a nonce whose request was aborted or turned away
COLLECTED = 256  # nonces whose rows are collected in one call

Values = NDArray[np.floating[Any]]
Prompt = Callable[[int], Tensor] | int
"""A function that returns the inputs of a nonce; or the number of placeholders that the workers fill."""

FULL = {"QueueOverflowError", "MaxQueuedTokensError"}
"""Errors of vLLM's admission control, after which the nonce is tried again as a client would."""


class RequestStream:
    """Runs nonces and hands out the values of each batch in order. It belongs to the engine's event loop.

    Args:
        client: Client that runs single nonces.
        spec: Round, and the pipeline that names what is published.
        nonces: Nonces in the order of the results, perhaps more than will ever be run.
        batch_size: Number of nonces that are handed out at a time.
        prompt: Inputs of the nonces.
    """

    def __init__(self, client: Client, spec: Spec, nonces: Sequence[int], batch_size: int, prompt: Prompt) -> None:
        self._client, self._spec, self._nonces = client, spec, nonces
        self._batch_size, self._prompt = batch_size, prompt
        self._batches: asyncio.Queue[asyncio.Task[Values] | None] = asyncio.Queue(AHEAD)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._producer: asyncio.Task[None] | None = None
        self._key = ""

    async def open(self) -> None:
        """Announce the stream to the workers, and begin.

        Raises:
            UsageError: The workers refuse the round.
        """
        self._key = await self._client.open(self._spec)
        self._client.closers.add(self.close)
        self._producer = self._start(self._produce())

    async def next(self) -> Values | None:
        """Return the values of the next batch, or None after the last.

        Raises:
            ModelError: The engine did not run a nonce.
        """
        assert self._producer is not None
        getting = asyncio.ensure_future(self._batches.get())
        await asyncio.wait({getting, self._producer}, return_when=asyncio.FIRST_COMPLETED)
        if not getting.done() and (self._producer.cancelled() or self._producer.exception() is not None):
            getting.cancel()
            self._producer.result()  # raises
        batch = await getting
        return None if batch is None else await batch

    async def close(self) -> None:
        """Abort what runs, and drop what the workers hold."""
        self._client.closers.discard(self.close)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        key, self._key = self._key, ""
        if key:
            with suppress(Exception):  # the engine may have ended, and its workers with it
                await self._client.close(key)

    def _start(self, work: Any) -> "asyncio.Task[Any]":
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # read, because asyncio logs every error that is never read

    async def _produce(self) -> None:
        if not await self._client.throttle.drained():
            log.warning("chat did not end in time and goes on beside the nonces")
        for start in range(0, len(self._nonces), self._batch_size):
            wanted = list(self._nonces[start : start + self._batch_size])
            running = [await self._launch(nonce) for nonce in wanted]
            await self._batches.put(self._start(self._finish(wanted, running)))
        await self._batches.put(None)

    async def _launch(self, nonce: int) -> "asyncio.Task[None]":
        prompt = self._prompt if isinstance(self._prompt, int) else await asyncio.to_thread(self._prompt, nonce)
        await self._client.throttle.admit()
        task = self._start(self._client.run(self._key, nonce, prompt))
        task.add_done_callback(lambda _: self._client.throttle.leave())
        return task

    async def _finish(self, wanted: Sequence[int], running: "Sequence[asyncio.Task[None]]") -> Values:
        """Wait for a batch and collect it in parts, so that the workers never hold many rows."""
        starts = range(0, len(wanted), COLLECTED)
        parts = [(wanted[at : at + COLLECTED], running[at : at + COLLECTED]) for at in starts]
        return np.concatenate([await self._collect(*part) for part in parts])

    async def _collect(self, wanted: Sequence[int], running: "Sequence[asyncio.Task[None]]") -> Values:
        """Wait for nonces and collect them; those that were aborted, for instance by a sleeping engine, run again."""
        values: dict[int, Values] = {}
        missing = list(wanted)
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(10.0 ** (attempt - 2))
                running = [await self._launch(nonce) for nonce in missing]
            await _all(running)
            values |= await self._client.collect(self._key, missing)
            missing = [nonce for nonce in wanted if nonce not in values]
            if not missing:
                return np.stack([values[nonce] for nonce in wanted])
        raise ModelError(
            f"vLLM did not run nonce {missing[0]} and {len(missing) - 1} others in {ATTEMPTS} attempts",
            wanted="requests that are not aborted",
            do="see the log of vLLM",
        )


async def _all(running: "Sequence[asyncio.Task[None]]") -> None:
    """Wait for all nonces, then raise the first error in words."""
    for outcome in await asyncio.gather(*running, return_exceptions=True):
        if isinstance(outcome, asyncio.CancelledError):
            raise outcome
        if isinstance(outcome, Exception) and type(outcome).__name__ not in FULL:
            raise ModelError(
                f"vLLM refused a nonce: {type(outcome).__name__}: {outcome}"[:400],
                wanted="an engine that takes requests of this length",
                do="see the log of vLLM",
            ) from outcome
