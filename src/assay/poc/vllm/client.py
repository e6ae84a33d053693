"""The serving side's client of an ``AsyncLLM``: requests of nonces, and calls into its workers.

Everything here runs in the event loop of the engine.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from assay.errors import BadWeights, EngineEnded, ModelError, UsageError, reason_of
from assay.poc.protocol.fingerprint import Fingerprint
from assay.poc.protocol.pins import with_cache
from assay.poc.vllm.direct_path import DirectPath
from assay.poc.vllm.lockstep import Lockstep
from assay.poc.vllm.rows import Spec, request_id, unpack_values
from assay.poc.vllm.throttle import Throttle, ThrottleSettings

# vLLM takes lower values first; requests of clients have 0 unless they choose.
NONCE_PRIORITY = 1_000_000
TIMEOUT = 120.0  # seconds for a call into the workers
DEATH_SECONDS = 0.5  # between two looks at whether the engine has died

Rows = NDArray[np.floating[Any]]

# VLLM's error for everything that is asked of an engine whose process has died. The server ends
# then.
DEAD = "EngineDeadError"
COUNTS_KEPT = 1.0  # seconds for which what the workers hold is not asked again


class Client:
    """Runs nonces on one ``AsyncLLM``; calls reach all its data-parallel engines."""

    loop: asyncio.AbstractEventLoop
    positions: int  # of the longest prompt that the engine takes
    description: dict[str, Any]  # what the worker with the hidden states says of itself

    def __init__(self, llm: Any, throttle: Throttle, engines: int = 1, version: str = "") -> None:
        self.throttle = throttle
        self.version = version
        # Done once the engine ends: what waits for a nonce must not wait longer.
        self.ended: Future[None] = Future()
        # The `close` of every open stream of nonces.
        self.closers: set[Callable[[], Awaitable[None]]] = set()
        self.llm = llm
        self.engines = engines
        ranked = llm.vllm_config.scheduler_config.policy == "priority"
        self._priority = NONCE_PRIORITY if ranked else 0
        self.direct = DirectPath(throttle, self.call, engines)
        # Those of a dense model step each by itself.
        if engines > 1 and llm.vllm_config.model_config.is_moe:
            self.direct.lockstep = Lockstep(llm, self.direct.wait_for_calls)
        self._counting: asyncio.Task[list[Any]] | None = None
        self._counted_at = -math.inf

    async def install(self) -> None:
        """Prepare the workers; the device names all kinds that compute one pass."""
        self.loop = asyncio.get_running_loop()
        self.positions = most_positions(self.llm.vllm_config)
        replies = await self.call("assay_install")
        self.description = replies[-1] | {
            "device": " + ".join(sorted({reply["device"] for reply in replies}))
        }

    def fingerprint(self, batch_size: int, seq_len: int) -> Fingerprint:
        """Return how the engine computes so many sequences of so many positions at a time."""
        worker = self.description
        return Fingerprint(
            engine="vllm",
            device=worker["device"],
            dtype=with_cache(worker["format"] or worker["dtype"], worker["cache"]),
            attention=worker["attention"],
            batch_size=batch_size,
            seq_len=seq_len,
            threads=worker["threads"],
            torch=torch.__version__,
            library=f"vllm {self.version}",
            kernels=(
                f"runner {worker['runner']}",
                f"tp {worker['tensor_parallel']}",
                f"pp {worker['pipeline_parallel']}",
                *worker["experts_over"],
                "eager" if worker["eager"] else "compiled",
                *worker["products"],
            ),
        )

    async def open(self, key: str, spec: Spec) -> None:
        """Begin a stream of nonces on every worker; a UsageError where one refuses the round."""
        frame = None if spec.frame is None else spec.frame.to_bytes()
        for reason in await self.call(
            "assay_open", key, asdict(spec.round), spec.pipeline.name, frame
        ):
            if reason is not None:
                raise UsageError(
                    reason, wanted="a round that vLLM can run", do="use --engine hf for it"
                )

    async def run(self, key: str, nonce: int, ids: list[int], sampling: Any) -> Any:
        """Run one nonce as a request, and return vLLM's last output."""
        name = request_id(key, nonce)
        last = None
        # cache_salt enters the hash of a prompt's first block (v1/core/kv_cache_utils.py): without
        # it other requests would find the blocks of a nonce in the prefix cache, where all nonces
        # have the same placeholder tokens.
        prompt = {"type": "token", "prompt_token_ids": ids, "cache_salt": name}
        async for output in self.llm.generate(prompt, sampling, name, priority=self._priority):
            last = output
        return last

    async def collect(self, key: str, nonces: Sequence[int]) -> dict[int, Rows]:
        """Return the values of finished nonces, without those of aborted requests.

        Raises:
            ModelError: A worker could not run a nonce.
            BadWeights: A worker could not take a step of the pipeline.
        """
        values: dict[int, Rows] = {}
        for reply in await self.call("assay_collect", key, list(nonces)):
            for nonce, reason in reply["failed"].items():
                raise ModelError(
                    f"nonce {nonce}: {reason}",
                    wanted="inputs that the engine takes",
                    do="see the log",
                )
            if "error" in reply:
                raise BadWeights(
                    f"the transform failed: {reply['error']}", wanted="values", do="see the log"
                )
            values |= unpack_values(reply)
        return values

    async def end(self) -> None:
        """Give up every nonce while the engine still runs; called before it ends."""
        if not self.ended.done():
            self.ended.set_result(None)
        await asyncio.gather(*(close() for close in list(self.closers)), return_exceptions=True)

    def release(self) -> None:
        """Drop the reference to an ended engine, so that it cleans up before the process ends."""
        self.llm = None

    async def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker."""
        return await call_workers(self.llm, method, *args, engines=self.engines)

    async def counts(self) -> list[Any]:
        """Return what the workers hold; all who ask within :data:`COUNTS_KEPT` share one call."""
        counted_before = time.monotonic() - self._counted_at
        if self._counting is None or (self._counting.done() and counted_before > COUNTS_KEPT):
            self._counting = asyncio.ensure_future(self._count())
        # A client that leaves must not cancel what others wait for.
        return await asyncio.shield(self._counting)

    async def _count(self) -> list[Any]:
        counts = await self.call("assay_counts")
        self._counted_at = time.monotonic()
        return counts


def most_positions(config: Any) -> int:
    """Return the longest prompt of an engine, with room for one generated token."""
    longest = int(config.model_config.max_model_len) - 1
    scheduler = config.scheduler_config
    chunked = bool(getattr(scheduler, "enable_chunked_prefill", True))
    return longest if chunked else min(longest, int(scheduler.max_num_batched_tokens))


async def connect(llm: Any, settings: ThrottleSettings, seq_len: int, *, version: str) -> Client:
    """Return the client of an ``AsyncLLM`` with prepared workers, in the engine's event loop.

    Its throttle lets in as many nonces as fill one step of every stage of every engine and have the
    next one ready.
    """
    scheduler = llm.vllm_config.scheduler_config
    parallel = llm.vllm_config.parallel_config
    engines = int(parallel.data_parallel_size)
    step = max(1, int(scheduler.max_num_batched_tokens) // seq_len)
    stages = int(parallel.pipeline_parallel_size)
    fills = engines * max(1, min((1 + stages) * step, int(scheduler.max_num_seqs)))
    client = Client(
        llm,
        Throttle(settings, llm.output_processor.get_num_unfinished_requests, fills),
        engines,
        version,
    )
    await client.install()
    return client


async def call_workers(llm: Any, method: str, *args: Any, engines: int = 1) -> list[Any]:
    """Call a method of every worker of an ``AsyncLLM``, and return their replies.

    Raises:
        EngineEnded: The engine has died.
        ModelError: They did not answer in time.
    """
    calling = asyncio.ensure_future(_replies(llm, method, args, engines))
    dying = asyncio.ensure_future(_death(llm))
    try:
        async with asyncio.timeout(TIMEOUT):
            await asyncio.wait({calling, dying}, return_when=asyncio.FIRST_COMPLETED)
        if calling.done():
            return calling.result()
    except TimeoutError:
        raise ModelError(
            f"vLLM's workers did not answer {method} in {TIMEOUT:g} s",
            wanted="workers that run",
            do="see the log of vLLM",
        ) from None
    except Exception as error:  # of vLLM, and of any kind
        raise failure_of(error)(
            f"vLLM's workers did not run {method}: {reason_of(error)}"[:400],
            wanted="an engine that runs",
            do="see the log of vLLM",
        ) from error
    finally:
        calling.cancel()
        dying.cancel()
    raise EngineEnded(
        f"vLLM's engine died and did not answer {method}",
        wanted="an engine that runs",
        do="see the log of vLLM, and start it again",
    )


async def _replies(llm: Any, method: str, args: tuple[Any, ...], engines: int) -> list[Any]:
    """Return what every worker of every engine answers."""
    if engines == 1:
        return list(await llm.collective_rpc(method, args=args))
    # Of several engines collective_rpc asks all, and returns the replies of the first.
    of_engines = await llm.engine_core.call_utility_all_async(
        "collective_rpc", method, None, args, None
    )
    return [reply for of_engine in of_engines for reply in of_engine]


async def _death(llm: Any) -> None:
    """Wait until an engine has died: vLLM leaves a call into its workers waiting then."""
    while not llm.errored:
        await asyncio.sleep(DEATH_SECONDS)


def failure_of(error: Exception) -> type[ModelError]:
    """Return the error that one of vLLM stands for."""
    return EngineEnded if type(error).__name__ == DEAD else ModelError
