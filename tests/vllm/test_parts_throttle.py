"""The throttle: how many nonces may run beside chat, and when."""

import asyncio

import pytest

from assay.errors import UsageError
from assay.poc.vllm.throttle import Throttle, ThrottleSettings


@pytest.mark.parametrize(
    "wrong",
    [{"mode": "both"}, {"share": 0.0}, {"share": 1.5}, {"share": float("nan")}, {"chat_in_flight": 0}, {"drain": -1.0}],
)
def test_settings_of_the_throttle_are_bounded(wrong):
    with pytest.raises(UsageError):
        ThrottleSettings(**wrong)


class Engine:
    """Counts what is in an engine."""

    def __init__(self, **settings) -> None:
        self.chat = 0
        self.throttle = Throttle(ThrottleSettings(**settings), self.unfinished, 16)

    def unfinished(self) -> int:
        """Nonces in calls are no requests."""
        return self.chat + self.throttle.in_flight - self.throttle.in_calls


def test_chat_lowers_the_limit_and_an_idle_engine_raises_it():
    engine = Engine(chat_in_flight=2, quiet=0.0, in_flight=9)
    assert engine.throttle.limit == 9
    engine.chat = 1
    engine.throttle.settings = ThrottleSettings(chat_in_flight=2, in_flight=9)
    assert engine.throttle.limit == 2
    engine.throttle.settings = ThrottleSettings(mode="exclusive", in_flight=9)
    assert engine.throttle.limit == 9
    for chosen, limit in ((5, 5), (0, 16)):
        engine.throttle.settings = ThrottleSettings(mode="exclusive", in_flight=chosen)
        assert engine.throttle.limit == limit


def test_nonces_over_the_limit_wait_until_one_leaves():
    async def scenario() -> list[int]:
        engine = Engine(chat_in_flight=1, share=1.0)
        engine.chat = 1
        seen = []
        await engine.throttle.admit()
        waiting = asyncio.ensure_future(engine.throttle.admit())
        await asyncio.sleep(0.02)
        seen.append(engine.throttle.in_flight)
        engine.throttle.leave()
        await asyncio.wait_for(waiting, 5)
        seen.append(engine.throttle.in_flight)
        return seen

    assert asyncio.run(scenario()) == [1, 1]


def test_beside_chat_a_burst_leaves_before_the_next_and_rests_in_between():
    async def scenario() -> tuple[bool, bool]:
        engine = Engine(chat_in_flight=2, share=1e-6)
        engine.chat = 3
        await engine.throttle.admit()
        await engine.throttle.admit()
        engine.throttle.leave()
        full = not engine.throttle._may_start()  # one of two has left, and the burst is not over
        await asyncio.sleep(0.002)
        engine.throttle.leave()
        return full, not engine.throttle._may_start()

    assert asyncio.run(scenario()) == (True, True)


def test_nonces_that_run_together_are_a_burst_and_no_more_than_may_run():
    async def scenario() -> tuple[int, int, bool]:
        engine = Engine(chat_in_flight=4, share=1e-6)
        engine.chat = 1
        await engine.throttle.admit()
        found = engine.throttle.admit_more(2), engine.throttle.admit_more(9)
        for _ in range(4):
            engine.throttle.leave()
        return *found, engine.throttle._may_start()

    assert asyncio.run(scenario()) == (2, 1, False)


@pytest.mark.parametrize("mode", ["chat-first", "exclusive"])
def test_beside_chat_one_call_is_in_the_engine_which_takes_a_step_behind_it(mode: str):
    async def scenario() -> tuple[list[int], int]:
        engine = Engine(mode=mode, chat_in_flight=8, in_flight=8, share=1.0, forward="assay")
        throttle, seen = engine.throttle, []

        async def call() -> None:
            await throttle.admit()
            throttle.in_calls += 1

        waiting = [asyncio.ensure_future(call()) for _ in range(4)]
        await asyncio.sleep(0)
        seen.append(throttle.in_calls)  # without chat they are not bounded so
        engine.chat = 1
        for _ in waiting:
            throttle.in_calls -= 1
            throttle.leave()
        waiting = [asyncio.ensure_future(call()) for _ in range(4)]
        for _ in waiting:
            await asyncio.sleep(0.02)
            seen.append(throttle.in_calls)
            throttle.in_calls -= 1
            throttle.leave()
        return seen, sum(task.done() for task in waiting)

    assert asyncio.run(scenario()) == ([4, 1, 1, 1, 1], 4)


def test_exclusive_mode_waits_for_chat_and_no_longer_than_its_deadline():
    async def scenario() -> tuple[bool, bool]:
        engine = Engine(mode="exclusive", drain=0.05)
        engine.chat = 1
        late = await engine.throttle.drained()
        waiting = asyncio.ensure_future(engine.throttle.drained())
        engine.chat = 0
        return late, await waiting

    assert asyncio.run(scenario()) == (False, True)
