"""A stream of nonces that runs them as whole batches inside the workers where it can, and else as requests."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import numpy as np

from assay.errors import ModelError
from assay.poc.vllm.client import AHEAD, ATTEMPTS, Client, RequestStream, Values
from assay.poc.vllm.compatibility import own_forward_refused
from assay.poc.vllm.direct import CALLS, Pace
from assay.poc.vllm.rows import Spec, unpacked

log = logging.getLogger("assay.vllm")


class DirectStream(RequestStream):
    """Runs nonces on inputs that the workers make, and hands out the values of each batch in order.

    Args:
        client: Client that runs nonces.
        spec: Round, and the pipeline that names what is published.
        nonces: Nonces in the order of the results, perhaps more than will ever be run.
        batch_size: Number of nonces that are handed out at a time.
        seq_len: Number of positions of a nonce.
    """

    def __init__(self, client: Client, spec: Spec, nonces: Sequence[int], batch_size: int, seq_len: int) -> None:
        super().__init__(client, spec, nonces, batch_size, seq_len)
        self._batches = asyncio.Queue(AHEAD + CALLS * client.direct.most // batch_size)
        self._pace = Pace(0)
        self._calls: WeakSet[asyncio.Task[Any]] = WeakSet()
        self._call: asyncio.Task[Any] | None = None  # the last one
        self._covered = 0  # places of nonces that have begun

    async def _produce(self) -> None:
        self._pace = await self._client.direct.open(self._key, self._spec.round.seq_len)
        await super()._produce()

    async def _begin(self, place: int) -> "asyncio.Task[Any]":
        """Return the task of the nonce at a place: the last call if it has this nonce, a new one, or its request."""
        if place < self._covered and self._call is not None:
            return self._call
        count = await self._client.direct.admit(self._pace)
        if not count:
            return await self._begin_beside(place)
        nonces = list(self._nonces[place : place + count])
        self._covered = place + len(nonces)
        self._call = self._start(self._run_call(nonces, admitted=count))
        self._call.add_done_callback(lambda _: self._client.direct.leave(count))
        self._calls.add(self._call)
        return self._call

    async def _begin_beside(self, place: int) -> "asyncio.Task[Any]":
        """Begin with the nonce at a place beside chat, or where there are no calls."""
        self._covered = place + 1
        return await self._launch(self._nonces[place])

    async def _run_call(self, nonces: list[int], *, admitted: int = 0) -> dict[int, Values]:
        """Return the values of nonces that run inside the workers, none of them if they could not."""
        replies = await self._client.direct.run(self._key, self._pace, nonces, admitted=admitted)
        return {nonce: values for reply in replies for nonce, values in unpacked(reply).items()}

    async def _collect(self, wanted: Sequence[int], running: "Sequence[asyncio.Task[Any]]") -> Values:
        """Take the values of calls, and collect those of requests. What a call did not run is requested."""
        values: dict[int, Values] = {}
        for call in {task for task in running if task in self._calls}:
            values |= await asyncio.shield(call)  # other batches wait for it too
        left = [(nonce, task) for nonce, task in zip(wanted, running, strict=True) if nonce not in values]
        if left:
            requests = [await self._launch(nonce) if task in self._calls else task for nonce, task in left]
            missing = [nonce for nonce, _ in left]
            values |= dict(zip(missing, await super()._collect(missing, requests), strict=True))
        return np.stack([values[nonce] for nonce in wanted])


class OwnStream(DirectStream):
    """Runs every nonce in calls, because a request would run vLLM's forward pass, and the law of a build is of one.

    Beside chat a call has the few nonces that the throttle admits as it admits requests.
    """

    async def _produce(self) -> None:
        self._pace = await self._client.direct.open(self._key, self._spec.round.seq_len)
        if not self._pace.batch:
            raise own_forward_refused(str(self._client.direct.reason), "a round that assay's own forward pass takes")
        await RequestStream._produce(self)

    async def _begin_beside(self, place: int) -> "asyncio.Task[Any]":
        """Begin with all that may run beside chat now: for a GPU two nonces are hardly more work than one."""
        throttle = self._client.throttle
        await throttle.admit()
        nonces = list(self._nonces[place : place + throttle.settings.chat_in_flight])
        nonces = nonces[: 1 + throttle.admit_more(len(nonces) - 1)]
        self._covered = place + len(nonces)
        self._call = self._launched(nonces)
        return self._call

    async def _launch(self, nonce: int) -> "asyncio.Task[Any]":
        await self._client.throttle.admit()
        return self._launched([nonce])

    def _launched(self, nonces: list[int]) -> "asyncio.Task[Any]":
        """Return the call of nonces that the throttle has admitted."""
        throttle = self._client.throttle
        throttle.in_calls += len(nonces)
        call = self._start(self._run_call(nonces))
        self._calls.add(call)

        def leave(_: object) -> None:
            throttle.in_calls -= len(nonces)
            for _nonce in nonces:
                throttle.leave()

        call.add_done_callback(leave)
        return call

    async def _collect(self, wanted: Sequence[int], running: "Sequence[asyncio.Task[Any]]") -> Values:
        """Take the values of calls; nonces of calls that failed run again, each in a call of its own."""
        values: dict[int, Values] = {}
        for attempt in range(ATTEMPTS):
            missing = [nonce for nonce in wanted if nonce not in values]
            if attempt and missing:
                await asyncio.sleep(10.0 ** (attempt - 2))
                running = [await self._launch(nonce) for nonce in missing]
            for call in set(running):
                values |= await asyncio.shield(call)  # other batches wait for it too
            if all(nonce in values for nonce in wanted):
                return np.stack([values[nonce] for nonce in wanted])
        raise ModelError(
            f"vLLM's workers did not run nonces by assay's own forward pass: {self._client.direct.reason}",
            wanted="passes that run",
            do="see the log of vLLM, or leave ASSAY_VLLM_FORWARD=assay out",
        )
