"""What the workers of an engine hold is asked once for all who want to know."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from assay.errors import ModelError
from assay.poc.vllm.client import COUNTS_KEPT, Client

CONFIG = SimpleNamespace(scheduler_config=SimpleNamespace(policy="fcfs"))


class Engine:
    """Stands for an ``AsyncLLM`` whose workers take a moment."""

    def __init__(self) -> None:
        self.vllm_config = CONFIG
        self.calls = 0
        self.failing = False
        self.errored = False

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[int]:
        self.calls += 1
        await asyncio.sleep(0.01)
        if self.failing:
            raise RuntimeError("no worker")
        return [self.calls]


def test_many_requests_are_one_call_of_the_workers():
    async def ask() -> None:
        engine = Engine()
        client = Client(engine, throttle=None)
        leaving = asyncio.ensure_future(client.counts())
        await asyncio.sleep(0)
        leaving.cancel()
        assert await asyncio.gather(*(client.counts() for _ in range(200))) == [[1]] * 200
        assert await client.counts() == [1]
        await asyncio.sleep(COUNTS_KEPT + 0.1)
        assert await client.counts() == [2]
        assert engine.calls == 2

    asyncio.run(ask())


def test_a_call_that_failed_is_not_kept():
    async def ask() -> None:
        engine = Engine()
        client = Client(engine, throttle=None)
        engine.failing = True
        with pytest.raises(ModelError):
            await client.counts()
        engine.failing = False
        assert await client.counts() == [2]

    asyncio.run(ask())
