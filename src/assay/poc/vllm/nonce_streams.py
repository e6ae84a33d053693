"""Streams of nonces through an ``AsyncLLM``: admitted, collected a batch at a time, in order.

:class:`NonceStream` runs whole batches in calls where it can, and the two others nonces of several
steps. Everything here runs in the event loop of the engine.

Legend of shapes: B nonces of a batch, M nonces of a stream, N tokens, S sketches, K numbers of a
sketch.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from typing import Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from assay.errors import ModelError, not_finite, reason_of
from assay.poc.engines.base import Values, drawn_prompts, token_inputs
from assay.poc.protocol.pipelines import SKETCH_SIZE, sketch_steps
from assay.poc.vllm.client import Client, Rows, failure_of
from assay.poc.vllm.direct_path import CALLS, CallSizer
from assay.poc.vllm.rows import CLAIMED, Spec, new_key

log = logging.getLogger("assay.vllm")

AHEAD = 2  # batches that may be finished before they are asked for
ATTEMPTS = 3  # for a nonce whose request was aborted or turned away
COLLECTED = 256  # nonces whose rows are collected in one call
# Errors of vLLM's admission control, after which a nonce is tried again as a client would.
FULL = {"QueueOverflowError", "MaxQueuedTokensError"}


class NonceStream:
    """Runs nonces and returns the values of batches in order, in the engine's event loop.

    Without chat whole batches run in calls into the workers where they can; all other nonces are
    requests.

    ``nonces`` are in the order of the results, and perhaps more than will ever be run.
    ``batch_size`` of them are handed out at a time. Of a pipeline with steps, ``claimed_MN`` is
    what another node states of them, a row for each nonce, which one pass replays; None runs them.
    """

    def __init__(
        self,
        client: Client,
        spec: Spec,
        nonces: Sequence[int],
        batch_size: int,
        claimed_MN: NDArray[Any] | None = None,
    ) -> None:
        self._client = client
        self._spec = spec
        self._nonces = nonces
        self._batch_size = batch_size
        self._steps = spec.pipeline.steps
        self._claimed = None if claimed_MN is None else dict(zip(nonces, claimed_MN, strict=True))
        ahead = AHEAD + (0 if self._steps else CALLS * client.direct.most // batch_size)
        self._batches: asyncio.Queue[asyncio.Task[Rows] | None] = asyncio.Queue(ahead)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._producer: asyncio.Task[None] | None = None
        self.key = ""
        self._sizer = CallSizer(0)
        self._calls: WeakSet[asyncio.Task[Any]] = WeakSet()
        self._collecting = asyncio.Lock()
        self._finished_nonces: list[int] = []
        self._rows: dict[int, Rows] = {}

    @property
    def passes(self) -> int:
        """Passes of the engine for each nonce; those that run steps take one for each."""
        return 1 if self._claimed is not None else max(1, self._steps)

    def values(self, rows: Rows) -> Values:
        """Return what the pipeline publishes of the next batch, from what the workers gave."""
        return {self._spec.pipeline.output: rows}

    async def open(self) -> None:
        """Announce the stream to the workers, which may refuse the round, and begin."""
        self.key = new_key()
        self._client.closers.add(self.close)
        await self._client.open(self.key, self._spec)
        self._producer = self._start(self._produce())

    async def next(self) -> Rows | None:
        """Return the next batch of values, None after the last; raise for a failed nonce."""
        assert self._producer is not None
        getting = self._start(self._batches.get())
        await asyncio.wait({getting, self._producer}, return_when=asyncio.FIRST_COMPLETED)
        if not getting.done():
            self._producer.result()  # raises if it has failed
        batch = await getting
        return None if batch is None else await batch

    async def close(self) -> None:
        """Abort what runs, and drop what the workers hold."""
        self._client.closers.discard(self.close)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        key = self.key
        self.key = ""
        if key:
            # The engine may have ended, and its workers with it.
            with suppress(Exception):
                await self._client.call("assay_close", key)

    def _start(self, work: Any) -> "asyncio.Task[Any]":
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Read the error, because asyncio logs every one that is never read.
            task.exception()

    async def _produce(self) -> None:
        # Nonces that decode are requests.
        if not self._steps:
            self._sizer = await self._client.direct.open(self.key, self._spec.round.seq_len)
        if not await self._client.throttle.drained():
            log.warning("chat did not end in time and goes on beside the nonces")
        begun: list[asyncio.Task[Any]] = []  # those of nonces that are not collected yet
        for start in range(0, len(self._nonces), self._batch_size):
            end = min(start + self._batch_size, len(self._nonces))
            # Collected in parts as they run, so that the workers never hold many rows.
            parts = []
            for first in range(start, end, COLLECTED):
                nonces = list(self._nonces[first : min(first + COLLECTED, end)])
                while len(begun) < len(nonces):
                    begun += await self._begin(first + len(begun))
                parts.append(self._start(self._collect(nonces, begun[: len(nonces)])))
                begun = begun[len(nonces) :]
            await self._batches.put(self._start(self._joined(parts)))
        await self._batches.put(None)

    async def _begin(self, place: int) -> "list[asyncio.Task[Any]]":
        """Begin nonces from a place on, and return the task of each: those of a call, or the
        request of one beside chat, or where there are no calls.
        """
        count = await self._client.direct.admit(self._sizer)
        if not count:
            return [await self._launch(self._nonces[place])]
        nonces = list(self._nonces[place : place + count])
        call = self._start(self._client.direct.run(self.key, self._sizer, nonces, admitted=count))
        call.add_done_callback(lambda _: self._client.direct.leave(count))
        self._calls.add(call)
        return [call] * len(nonces)

    async def _launch(self, nonce: int) -> "asyncio.Task[Any]":
        request = await asyncio.to_thread(self._request, nonce)
        await self._client.throttle.admit()
        task = self._start(self._client.run(self.key, nonce, *request))
        task.add_done_callback(lambda _: self._client.throttle.leave(self.passes))
        return task

    async def _joined(self, parts: "Sequence[asyncio.Task[Rows]]") -> Rows:
        return np.concatenate(await asyncio.gather(*parts))

    def _request(self, nonce: int) -> tuple[list[int], Any]:
        """Return the ids of a nonce's request, which may be placeholders that the workers fill, and
        its parameters.
        """
        round = self._spec.round
        frame = self._spec.frame
        if frame is None:
            return [0] * round.seq_len, sampling_parameters()
        return token_inputs(round.inputs([nonce]), frame, seq_len=round.seq_len)[
            0
        ].tolist(), sampling_parameters()

    def _whole(self, nonce: int, outcome: Any) -> bool:
        """Return whether a request ran to its end, as far as its last output says."""
        return True

    async def _take(self, nonces: list[int]) -> dict[int, Rows]:
        """Return the values of finished nonces; batches that finish meanwhile share a call."""
        self._finished_nonces += nonces
        async with self._collecting:
            if self._finished_nonces:
                finished = self._finished_nonces
                self._finished_nonces = []
                self._rows |= await self._client.collect(self.key, finished)
        return {nonce: self._rows.pop(nonce) for nonce in nonces if nonce in self._rows}

    async def _collect(self, nonces: Sequence[int], running: "Sequence[asyncio.Task[Any]]") -> Rows:
        """Take the values of calls, and collect those of requests.

        What a call did not run is requested, and what was aborted, for instance by a sleeping
        engine, runs again.
        """
        values: dict[int, Rows] = {}
        for call in {task for task in running if task in self._calls}:
            values |= await asyncio.shield(call)  # other parts wait for it too
        pending = {
            nonce: task for nonce, task in zip(nonces, running, strict=True) if nonce not in values
        }
        for attempt in range(ATTEMPTS):
            if not pending:
                break
            if attempt:
                await asyncio.sleep(10.0 ** (attempt - 2))
            requested = [
                await self._launch(nonce) if attempt or task in self._calls else task
                for nonce, task in pending.items()
            ]
            outcomes = await asyncio.gather(*requested, return_exceptions=True)
            for outcome in outcomes:
                if isinstance(outcome, asyncio.CancelledError):
                    raise outcome
                if isinstance(outcome, Exception) and type(outcome).__name__ not in FULL:
                    seen = f"vLLM refused a nonce: {reason_of(outcome)}"[:400]
                    raise failure_of(outcome)(
                        seen, wanted="an engine that takes its length", do="see the log of vLLM"
                    ) from outcome
            collected = await self._take(list(pending))
            for nonce, outcome in zip(pending, outcomes, strict=True):
                if self._whole(nonce, outcome) and nonce in collected:
                    values[nonce] = collected[nonce]
            pending = {nonce: task for nonce, task in pending.items() if nonce not in values}
        if pending:
            raise ModelError(
                f"vLLM did not run nonce {next(iter(pending))} and {len(pending) - 1} others in "
                f"{ATTEMPTS} attempts",
                wanted="requests that are not aborted",
                do="see the log of vLLM",
            )
        return np.stack([values[nonce] for nonce in nonces])


def sampling_parameters(max_tokens: int = 1, **fields: Any) -> Any:
    """Return the ``SamplingParams`` of a nonce; vLLM requires ``max_tokens`` of at least 1."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_reading_prefix_cache=True,
        **fields,
    )


class TokenStream(NonceStream):
    """Runs nonces that decode, or replays claimed tokens."""

    def __init__(self, client: Client, spec: Spec, nonces: Sequence[int], *rest: Any) -> None:
        super().__init__(client, spec, nonces, *rest)
        self._vocab_size = client.description["vocab_size"]
        self._tokens: dict[int, list[int]] = {}
        self._order = iter(nonces)  # of those whose values are still to be returned

    @override
    def values(self, rows: Rows) -> Values:
        # An infinite margin is that of an id without a token.
        if np.isnan(rows).any():
            raise not_finite("vLLM returned NaN or infinity")
        count = len(sketch_steps(self._steps))
        flat_BN, margins_BN = np.split(rows, [count * SKETCH_SIZE], axis=1)
        sketches_BSK = flat_BN.reshape(-1, count, SKETCH_SIZE).astype(np.float16)
        if self._claimed is not None:
            return {"margins": margins_BN.astype(np.float32), "sketches": sketches_BSK}
        tokens = [self._tokens.pop(nonce) for nonce in islice(self._order, len(rows))]
        return {"tokens": np.array(tokens, dtype=np.uint32), "sketches": sketches_BSK}

    @override
    def _request(self, nonce: int) -> tuple[list[int], Any]:
        prompt: list[int] = drawn_prompts(
            self._spec.round.inputs([nonce]),
            seq_len=self._spec.round.seq_len,
            vocab_size=self._vocab_size,
        )[0].tolist()
        if self._claimed is None:
            # Nothing may end the text early.
            return prompt, sampling_parameters(self._steps, ignore_eos=True)
        claimed = self._claimed[nonce]
        claimed_ids = np.minimum(claimed[:-1], self._vocab_size - 1)
        return prompt + claimed_ids.tolist(), sampling_parameters(
            extra_args={CLAIMED: claimed.tolist()}
        )

    @override
    def _whole(self, nonce: int, outcome: Any) -> bool:
        if isinstance(outcome, Exception) or outcome is None:
            return False
        if self._claimed is None:
            self._tokens[nonce] = list(outcome.outputs[0].token_ids)
        return self._claimed is not None or len(self._tokens[nonce]) == self._steps


class PointStream(NonceStream):
    """Runs chains of nonces, or replays claimed points; a chain has one point more than steps."""

    @property
    @override
    def passes(self) -> int:
        return 1 if self._claimed is not None else self._steps + 1

    @override
    def values(self, rows: Rows) -> Values:
        if self._claimed is not None:
            return {"margins": rows.astype(np.float32)}
        return {"points": rows.astype(np.uint8)}

    @override
    def _request(self, nonce: int) -> tuple[list[int], Any]:
        length = self._spec.round.seq_len
        if self._claimed is None:
            return [0] * length, sampling_parameters(self._steps + 1, ignore_eos=True)
        claimed = self._claimed[nonce].tolist()
        return [0] * (length + self._steps), sampling_parameters(extra_args={CLAIMED: claimed})
