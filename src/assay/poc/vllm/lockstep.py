"""Calls and steps of the data-parallel engines of a mixture, which share its experts, kept apart.

Such engines step together: in every layer of experts the pass of one waits for a pass of each other
one. A call reaches all engines in the same order, so its passes meet. A step that one engine begins
between two calls would meet a pass of the next call instead, and the engines would wait for each
other for good. So no call begins while engines step, and a request waits until no call runs.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import torch

# Looks, a TICK apart, at which engines must be at rest: a message that they step may come later
# than the answer of the request that they step for.
LOOKS = 3


class Lockstep:
    """Holds requests back from engines that step together while calls run.

    Every request of an ``AsyncLLM``, of chat and of nonces, goes through its ``engine_core``
    (``DPLBAsyncMPClient`` in ``v1/engine/core_client.py``). ``calls_end`` waits until no call runs.
    """

    def __init__(self, llm: Any, calls_end: Callable[[], Awaitable[None]]) -> None:
        core = self._core = llm.engine_core
        self._send = core.add_request_async
        self._give_up = llm.output_processor.abort_requests
        self._calls_end = calls_end
        self.waiting = 0
        """Requests that wait until no call runs; no new call may begin before them."""
        self.looks_at_rest = 0
        """Looks one after the other, since the last request, at which the engines were at rest."""
        core.add_request_async = self._add

    @property
    def steps(self) -> bool:
        """Whether the engines step, as far as vLLM's coordinator has said.

        It says so after their first step. What is given up in that one nothing else counts any
        more, but an engine has it until it says that it has ended.
        """
        return bool(self._core.engines_running or self._core.reqs_in_flight)

    @property
    def rested(self) -> bool:
        """Whether the engines have stopped since the last request, so that a call may begin."""
        return self.looks_at_rest >= LOOKS

    async def _add(self, request: Any) -> None:
        self.waiting += 1
        try:
            await self._calls_end()
            self.looks_at_rest = 0
        except asyncio.CancelledError:
            # Its client has left. vLLM counts it since before it was sent, and gives up by itself
            # only what was: it would count it, as chat, for good.
            self._give_up([request.request_id], internal=True)
            raise
        finally:
            self.waiting -= 1
        await self._send(request)


def all_ready(ready: bool) -> bool:
    """Return in every engine whether all are ready for the passes of a call.

    An engine that has left a call would leave the others waiting in their passes.
    """
    from vllm.distributed import get_dp_group

    flag = torch.tensor(int(ready), dtype=torch.int32)
    torch.distributed.all_reduce(
        flag, op=torch.distributed.ReduceOp.MIN, group=get_dp_group().cpu_group
    )
    return bool(flag)
