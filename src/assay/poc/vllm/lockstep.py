"""Calls and steps of the data-parallel engines of a mixture, which share its experts, kept apart.

Such engines step together: in every layer of experts the pass of one waits for a pass of each other
one. A call reaches all engines in the same order, so its passes meet. A step that one engine begins
between two calls would meet a pass of the next call instead, and the engines would wait for each
other for good. So no call begins while engines step, and a request waits until no call runs.
"""

import asyncio
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NoReturn

import torch

log = logging.getLogger("assay.vllm")

# Seconds that engines must be at rest: a message that they step may come later than the answer of
# the request that they step for.
REST = 0.04
# They let engines step until all of them have heard of it.
PAUSES = ("pause_scheduler_async", "resume_scheduler_async")


class Lockstep:
    """Holds requests back from engines that step together while calls run.

    Every request of an ``AsyncLLM``, of chat and of nonces, goes through its ``engine_core``
    (``DPLBAsyncMPClient`` in ``v1/engine/core_client.py``). ``wait_for_calls`` waits until no call
    runs.
    """

    def __init__(self, llm: Any, wait_for_calls: Callable[[], Awaitable[None]]) -> None:
        core = self._core = llm.engine_core
        self._send = core.add_request_async
        self._give_up = llm.output_processor.abort_requests
        self._wait_for_calls = wait_for_calls
        # Requests and pauses that wait until no call runs; no call may begin before they have.
        self._waiting = 0
        # Time of the first look that found engines at rest, of those since the last of them.
        self._at_rest_from = math.inf
        core.add_request_async = self._add
        for name in PAUSES:
            setattr(core, name, partial(self._hold, getattr(core, name)))

    def rests(self, nonces: int) -> bool:
        """Look whether engines that have so many nonces as requests, and no chat, are at rest.

        A call may begin once they were at rest for :data:`REST`, however many streams look. vLLM's
        coordinator says that they step after their first step. What is given up in that one nothing
        else counts any more, but an engine has it until it says that it has ended.
        """
        now = time.monotonic()
        steps = self._core.engines_running or self._core.reqs_in_flight
        is_busy = steps or self._waiting or nonces
        self._at_rest_from = math.inf if is_busy else min(self._at_rest_from, now)
        return now - self._at_rest_from >= REST

    async def _add(self, request: Any) -> None:
        try:
            await self._hold(self._send, request)
        except asyncio.CancelledError:
            # Its client has left. vLLM counts it since before it was sent, and gives up by itself
            # only what was: it would count it, as chat, for good.
            self._give_up([request.request_id], internal=True)
            raise

    async def _hold(self, begin: Callable[..., Awaitable[Any]], *args: Any, **options: Any) -> Any:
        self._waiting += 1
        try:
            await self._wait_for_calls()
            return await begin(*args, **options)
        finally:
            self._waiting -= 1
            self._at_rest_from = math.inf


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


def end_engine(error: Exception) -> NoReturn:
    """End the process of an engine that failed in the layers of a pass, and with it the server.

    The others wait there for its experts. A pass that it ran next would meet the layers that they
    are in, so they would compute with wrong states and then wait for good, and chat with them. vLLM
    ends an engine whose step fails, too.
    """
    log.critical("an engine failed in a pass for which others wait, and ends", exc_info=error)
    os._exit(1)
