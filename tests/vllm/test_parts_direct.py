"""The parts of the direct path that need no vLLM: how long calls are, when nonces are requests, and failures."""

import asyncio
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from assay.errors import ModelError
from assay.poc.engines.outputs import Landing
from assay.poc.vllm import direct_worker as _direct_worker
from assay.poc.vllm.direct import CALLS, FAILURES, MOST, Pace
from assay.poc.vllm.direct_stream import DirectStream
from tests.vllm.direct import SPEC, Workers, run, values_of


def test_a_call_grows_to_the_time_that_chat_may_wait_and_not_beyond():
    pace = Pace(batch=24)
    counts = []
    for _ in range(16):
        counts.append(pace.next(0.1, MOST))
        pace.ran(counts[-1], counts[-1] * 0.001)
    assert counts[:5] == [1, 2, 4, 8, 16]
    assert counts[-1] == 96  # of the hundred nonces that fit, whole passes
    pace.seconds = 1.0
    assert pace.next(0.1, MOST) == 1
    pace.seconds = 1e-9
    pace.nonces = 10 * MOST
    assert pace.next(0.1, MOST) == MOST - MOST % 24
    assert pace.next(0.1, 5) == 4


@pytest.mark.parametrize("batch", [1, 20, 100, MOST, 10 * MOST])
def test_calls_have_few_sizes(batch: int):
    pace, sizes = Pace(batch, seconds=0.001, nonces=MOST), set()
    for fitting in range(1, MOST + 1):
        sizes.add(pace.next((fitting + 0.5) / 1000, MOST))
        assert pace.next((fitting + 0.5) / 1000, MOST) <= fitting
    assert len({size for size in sizes if size < batch}) <= 2 * batch.bit_length()
    assert all(size % batch == 0 for size in sizes if size > batch)


def test_the_first_call_of_a_size_says_nothing_about_the_time_of_a_nonce():
    pace = Pace(batch=64)
    for seconds in (1.6, 0.01):  # kernels are chosen in the first one
        pace.ran(1, seconds)
    assert pace.seconds == 0.01
    pace.ran(2, 0.5)
    assert (pace.seconds, pace.nonces) == (0.01, 2)
    pace.ran(2, 0.012)
    assert pace.seconds == 0.006


@pytest.fixture(autouse=True)
def no_sampling_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assay.poc.vllm.client._sampling", lambda: None)


def test_without_chat_all_nonces_run_in_calls_two_at_once_and_come_in_order():
    workers = Workers()
    assert run(workers, 203) == list(range(203))
    assert workers.requested == []
    assert list(chain(*workers.called)) == list(range(203))
    assert workers.most == CALLS
    assert workers.client.direct.describe() == {
        "now": True,
        "reason": None,
        "calls": len(workers.called),
        "nonces": 203,
    }
    assert workers.client.direct.in_flight == 0


@pytest.mark.parametrize("engines", [2, 3])
def test_every_engine_gets_an_equal_share_of_each_call(engines: int):
    workers = Workers(engines=engines)
    assert run(workers, 203) == list(range(203))
    assert workers.requested == []
    assert sorted(chain(*workers.called)) == list(range(203))
    assert sorted(chain(*chain(*workers.dealt))) == list(range(203))
    assert len(workers.dealt) == workers.client.direct.calls
    assert all(len(shares) == engines and len(shares[0]) - len(shares[-1]) <= 1 for shares in workers.dealt)


def worker_of(begin) -> _direct_worker.DirectMethods:
    """A worker of one stream, whose passes are those of a function."""
    worker = _direct_worker.DirectMethods()
    worker.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_index=1))
    stream = SimpleNamespace(spec=SPEC, touched=0.0)
    worker.assay_hooks = SimpleNamespace(rows=SimpleNamespace(get={"key": stream}.get))
    worker.assay_passes = SimpleNamespace(begin=begin)
    worker.model_runner = SimpleNamespace(device=torch.device("cpu"))
    return worker


def test_a_worker_runs_the_share_of_its_engine():
    ran = []

    def begin(spec, nonces, batch):
        ran.append((nonces, batch))
        return Landing(torch.tensor(nonces, dtype=torch.float32))

    worker = worker_of(begin)
    assert worker.assay_pass("a", "key", [[1, 3], [2, 4]], 2, True)[0]["nonces"] == [2, 4]
    assert worker.assay_pass("b", "key", [[5], []], 1, True) == [{"call": "b"}]
    one = worker.assay_pass("c", "key", [[6, 7]], 2, True)[0]
    assert one["nonces"] == [6, 7]  # one engine, whatever it is called
    assert one["seconds"] > 0
    assert ran == [([2, 4], 2), ([6, 7], 2)]


def test_a_worker_queues_a_call_before_it_waits_for_the_values_of_the_one_before():
    happened = []

    class Values:
        def __init__(self, nonces):
            self.nonces = nonces

        def numpy(self):
            happened.append(("waited", self.nonces))
            if self.nonces == [2]:
                raise RuntimeError("an error of the device")
            return np.array(self.nonces, np.float32)

    def begin(spec, nonces, batch):
        happened.append(("queued", nonces))
        if nonces == [3]:
            raise RuntimeError("no memory")
        return Values(nonces)

    worker = worker_of(begin)
    replies = [worker.assay_pass(str(nonce), "key", [[nonce]], 1, False) for nonce in (1, 2, 3)]
    assert replies[0] == []
    assert [(each["call"], each["nonces"]) for each in replies[1]] == [("1", [1])]
    assert replies[2] == [{"call": "2", "error": "RuntimeError: an error of the device"}]
    assert worker.assay_pass("4", "gone", [[4]], 1, False) == [{"call": "3", "error": "RuntimeError: no memory"}]
    assert worker.assay_flush() == [{"call": "4", "error": "the stream has ended"}]
    assert worker.assay_flush() == []
    wanted = [("queued", [1]), ("queued", [2]), ("waited", [1]), ("queued", [3]), ("waited", [2])]
    assert happened == wanted


def test_with_chat_nonces_are_requests_and_calls_come_back_after_it():
    workers = Workers(quiet=0.0, share=1.0)

    async def chat(done: int) -> None:
        workers.chat = int(40 <= done < 120)

    assert run(workers, 400, between=chat) == list(range(400))
    called = sorted(chain(*workers.called))
    assert called[0] == 0
    assert called[-1] == 399
    assert workers.requested
    assert sorted(workers.requested + called) == list(range(400))


@pytest.mark.parametrize(("settings", "batch"), [({"path": "requests"}, 4), ({}, 0)])
def test_where_calls_are_not_wanted_or_not_possible_all_nonces_are_requests(settings, batch):
    workers = Workers(batch=batch, **settings)
    assert run(workers, 40) == list(range(40))
    assert (workers.called, sorted(workers.requested)) == ([], list(range(40)))
    described = workers.client.direct.describe()
    assert (described["now"], described["reason"]) == (False, "a reason" if not batch else "ASSAY_VLLM_PATH=requests")


def test_what_a_call_did_not_run_is_requested_and_after_some_failures_there_are_no_calls():
    async def scenario() -> None:
        workers = Workers()
        workers.broken = True
        assert await values_of(workers, 64) == list(range(64))
        assert sorted(workers.requested) == list(range(64))
        assert FAILURES <= len(workers.called) <= FAILURES + CALLS
        workers.called.clear()
        assert await values_of(workers, 16) == list(range(16))
        assert workers.called == []
        assert workers.client.direct.describe() == {"now": False, "reason": "broken", "calls": 0, "nonces": 0}

    asyncio.run(scenario())


def test_an_engine_that_dies_fails_its_nonces_in_words():
    workers = Workers()
    workers.dead = True
    with pytest.raises(ModelError, match="EngineCore died"):
        run(workers, 64)


def test_the_rest_of_a_stream_says_nothing_about_the_next_call():
    workers = Workers(batch=16)
    run(workers, 500)
    pace = workers.client.direct._paces[8]
    before = (pace.seconds, pace.nonces, set(pace.tried))
    assert before[1] > 3
    workers.called.clear()
    assert run(workers, 3) == list(range(3))
    assert workers.called == [[0, 1, 2]]
    assert (pace.seconds, pace.nonces, pace.tried) == before


def test_values_are_asked_for_alone_only_where_no_call_follows():
    workers = Workers(batch=16)
    assert run(workers, 16 * 100) == list(range(16 * 100))
    assert len(workers.called) > 20
    assert workers.flushed <= 2


def test_calls_come_to_their_full_length_and_keep_it():
    workers = Workers(batch=16)
    run(workers, 16 * 60)
    sizes = [len(nonces) for nonces in workers.called]
    assert sizes[:5] == [1, 1, 2, 2, 4]
    assert max(sizes) >= 48
    assert sizes[:-1] == sorted(sizes[:-1])  # the last one has the rest


def test_values_that_the_workers_have_lost_are_computed_again():
    workers = Workers()

    async def lose(done: int) -> None:
        if done == 40:
            workers.begun.clear()

    assert run(workers, 64, between=lose) == list(range(64))
    assert workers.client.direct.in_flight == 0


def test_a_stream_that_is_closed_does_not_take_along_the_values_of_another():
    async def scenario(workers: Workers) -> None:
        closed = DirectStream(workers.client, SPEC, range(2**40), 8, 8)
        await closed.open()
        others = asyncio.ensure_future(values_of(workers, 400))
        for _ in range(5):
            await closed.next()
        await closed.close()
        assert await others == list(range(400))
        assert workers.requested == []
        assert workers.client.direct.in_flight == 0

    asyncio.run(scenario(Workers()))


def test_a_stream_that_is_closed_leaves_no_nonce_in_flight():
    async def scenario(workers: Workers) -> None:
        stream = DirectStream(workers.client, SPEC, range(2**40), 8, 8)
        await stream.open()
        await stream.next()
        await stream.close()

    workers = Workers()
    asyncio.run(scenario(workers))
    assert workers.client.direct.in_flight == workers.throttle.in_flight == 0
