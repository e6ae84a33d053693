"""The serving side: nonces as requests of an ``AsyncLLM``, and their results from its workers.

Everything here runs in the event loop of the engine.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from assay.errors import BackendUnavailable, BadWeights, ModelError, UsageError
from assay.poc.engines.vllm._throttle import Throttle
from assay.poc.engines.vllm._wire import Spec, new_key, request_id

NONCE_PRIORITY = 1_000_000
"""vLLM takes lower values first; requests of clients have 0 unless they choose."""

TIMEOUT = 120.0  # seconds for a call into the workers


class Client:
    """Runs nonces on one engine.

    Args:
        llm: Engine client of vLLM, an ``AsyncLLM``.
        throttle: Throttle that admits nonces.
    """

    def __init__(self, llm: Any, throttle: Throttle) -> None:
        self.throttle = throttle
        self.description: dict[str, Any] = {}
        self.ended: Future[None] = Future()
        """Done once the engine ends; what waits for a nonce must not wait any longer."""
        self.closers: set[Callable[[], Awaitable[None]]] = set()
        """The ``close`` of every open stream of nonces."""
        self._llm = llm
        ranked = llm.vllm_config.scheduler_config.policy == "priority"
        self._priority = NONCE_PRIORITY if ranked else 0

    async def install(self) -> dict[str, Any]:
        """Prepare the workers; return the description of the last one, which has the hidden states.

        Raises:
            BackendUnavailable: The workers lack a name that is used.
        """
        replies = await self._call("assay_install")
        problems = sorted({problem for reply in replies for problem in reply["problems"]})
        if problems:
            raise BackendUnavailable(
                f"workers of vLLM without {', '.join(problems)}",
                wanted="every name of vLLM that is used",
                do="use a tested version",
            )
        self.description = replies[-1]
        return self.description

    async def open(self, spec: Spec) -> str:
        """Begin a stream of nonces on every worker; return its key.

        Raises:
            UsageError: The workers refuse the round.
        """
        key = new_key()
        for reason in await self._call("assay_open", key, spec.dumps()):
            if reason is not None:
                raise UsageError(reason, wanted="a round that vLLM can run", do="use --engine hf for it")
        return key

    async def close(self, key: str) -> None:
        """End a stream of nonces; the workers drop what they hold for it."""
        await self._call("assay_close", key)

    async def counts(self) -> list[dict[str, int]]:
        """Return what every worker holds."""
        return await self._call("assay_counts")

    async def run(self, key: str, nonce: int, prompt: Tensor | int) -> None:
        """Run one nonce: on inputs [T, D] that are sent, or on ``prompt`` placeholders that the workers fill."""
        name = request_id(key, nonce)
        async for _ in self._llm.generate(_prompt(prompt, name), _sampling(), name, priority=self._priority):
            pass

    async def collect(self, key: str, nonces: Sequence[int]) -> dict[int, NDArray[np.floating[Any]]]:
        """Return the values of nonces that have run, by nonce. A nonce whose request was aborted is missing.

        Raises:
            ModelError: A worker could not run a nonce.
            BadWeights: A worker could not take a step of the pipeline.
        """
        values: dict[int, NDArray[np.floating[Any]]] = {}
        for reply in await self._call("assay_collect", key, list(nonces)):
            for nonce, reason in reply["failed"].items():
                raise ModelError(f"nonce {nonce}: {reason}", wanted="inputs that the engine takes", do="see the log")
            if reply.get("error"):
                raise BadWeights(f"the transform failed: {reply['error']}", wanted="values", do="see the log")
            values |= _decode(reply)
        return values

    async def end(self) -> None:
        """Give up every nonce while the engine still runs; called before it ends."""
        if not self.ended.done():
            self.ended.set_result(None)
        await asyncio.gather(*(close() for close in list(self.closers)), return_exceptions=True)

    def release(self) -> None:
        """Drop the reference to an engine that has ended: it cleans up when it is freed, before the process ends."""
        self._llm = None

    async def _call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker."""
        try:
            async with asyncio.timeout(TIMEOUT):
                return list(await self._llm.collective_rpc(method, args=args))
        except TimeoutError:
            raise ModelError(
                f"vLLM's workers did not answer {method} in {TIMEOUT:g} s",
                wanted="workers that run",
                do="see the log of vLLM",
            ) from None


def _prompt(prompt: Tensor | int, salt: str) -> dict[str, Any]:
    # cache_salt enters the hash of a prompt's first block (v1/core/kv_cache_utils.py): without it other requests would
    # find the blocks of a nonce in the prefix cache, where all nonces have the same placeholder tokens.
    if isinstance(prompt, int):
        return {"type": "token", "prompt_token_ids": [0] * prompt, "cache_salt": salt}
    # A copy: pickling a view would send the whole tensor that it shows a part of.
    return {"type": "embeds", "prompt_embeds": prompt.detach().cpu().clone(), "cache_salt": salt}


@cache
def _sampling() -> Any:
    """Return the parameters of every nonce; vLLM's ``InputProcessor`` clones them for each request.

    One token is generated: vLLM requires ``max_tokens`` of at least 1.
    """
    from vllm import SamplingParams  # type: ignore[import-not-found]
    from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_reading_prefix_cache=True,
    )


def _decode(reply: dict[str, Any]) -> dict[int, NDArray[np.floating[Any]]]:
    if not reply.get("values"):
        return {}
    width = reply["width"]
    values = np.frombuffer(reply["values"], dtype=np.float16 if width else np.float32)
    rows = values.reshape(len(reply["nonces"]), width) if width else values
    return dict(zip(reply["nonces"], rows, strict=True))
