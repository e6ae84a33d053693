"""Throttle and direct path without vLLM: how many nonces run, in calls or as requests, and what a
pass reads.

Stand-ins are an engine with workers, its settings, and a model runner.
"""

import asyncio
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from assay.errors import ModelError
from assay.poc import Round, get_pipeline
from assay.poc.vllm.client import Client
from assay.poc.vllm.direct_passes import direct_path_blocker
from assay.poc.vllm.direct_path import CALLS, MOST, CallSizer
from assay.poc.vllm.nonce_streams import COLLECTED, NonceStream
from assay.poc.vllm.rows import Rows, Spec, split_id
from assay.poc.vllm.throttle import Throttle, ThrottleSettings
from assay.poc.vllm.worker import WorkerExtension
from tests.vllm.conftest import settings_of_vllm
from tests.wordings import refuses

SPEC = Spec(Round(block_hash="b", public_key="k", seq_len=8), get_pipeline("poc-2.0"))


class Workers:
    """An engine whose one worker returns the nonce itself, by either path."""

    def __init__(
        self, *, batch: int = 4, engines: int = 1, together: bool = False, **settings
    ) -> None:
        self.batch = batch
        self.chat = 0
        self.broken = False
        self.dead = False
        self.errored = False
        self.most = 0
        self.running = 0
        self.called: list[list[int]] = []
        self.dealt: list[list[list[int]]] = []
        self.requested: list[int] = []
        self.held = self.most_held = 0  # rows of requests that nothing has collected
        self.begun: dict[int, dict] = {}  # by engine, the call whose values nothing has asked for
        self.flushed = 0
        self.turn = asyncio.Lock()
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(policy="priority"),
            model_config=SimpleNamespace(is_moe=together),
        )
        self.together = together
        self.engines_running = False
        self.pause_scheduler_async = self.resume_scheduler_async = self.step_unseen
        self.reqs_in_flight: dict[str, bytes] = {}
        self.throttle = Throttle(
            ThrottleSettings(**settings), lambda: self.chat + self.throttle.in_flight, 16
        )
        self.engine_core = self.output_processor = self
        self.given_up: list[str] = []
        self.client = Client(self, self.throttle, engines)

    async def collective_rpc(self, method: str, args: tuple, engine: int = 0):
        if method == "assay_batch":
            return [{"batch": self.batch, "reason": None if self.batch else "a reason"}]
        if method == "assay_pass":
            call, _, shares, _, wait = args
            assert not (self.together and self.engines_running), "a call beside a step"
            self.called.append(shares[engine])
            if self.dead:
                raise RuntimeError("EngineCore died")
            found = (
                {"error": "broken"}
                if self.broken
                else {"seconds": 0.002, **self.reply(shares[engine])}
            )
            begun = {"call": call, **found}
            self.running += 1
            self.most = max(self.most, self.running)
            async with self.turn:  # a worker takes calls in order
                before, self.begun[engine] = self.begun.get(engine), begun
                await asyncio.sleep(0.002)
                self.running -= 1
                return [
                    [
                        each
                        for each in (before, self.begun.pop(engine, None) if wait else None)
                        if each
                    ]
                ]
        if method == "assay_flush":
            async with self.turn:
                self.flushed += 1
                return [[self.begun.pop(engine)] if engine in self.begun else []]
        if method == "assay_collect":
            self.held -= len(args[1])
            return [self.reply(args[1])]
        return [None]

    async def call_utility_all_async(self, utility: str, method: str, timeout, args: tuple, kwargs):
        assert (utility, timeout, kwargs) == ("collective_rpc", None, None)
        self.dealt += [args[2]] if method == "assay_pass" else []
        return [
            await self.collective_rpc(method, args, engine) for engine in range(self.client.engines)
        ]

    @staticmethod
    def reply(nonces):
        values = np.array(nonces, np.float32)
        return {
            "failed": {},
            "nonces": nonces,
            "values": values.tobytes(),
            "dtype": "float32",
            "width": 0,
        }

    async def generate(self, prompt, sampling, name, priority):
        if self.together:
            await self.engine_core.add_request_async(name)
        self.requested.append(split_id(name)[1])
        await asyncio.sleep(0)
        self.held += 1
        self.most_held = max(self.most_held, self.held)
        yield None

    async def step_unseen(self) -> None:
        """Step, of which no word comes."""
        assert not self.running, "a pause beside a call"
        await asyncio.sleep(0.03)
        assert not self.running, "a call beside a pause"

    def abort_requests(self, names: list[str], internal: bool) -> None:
        assert internal
        self.given_up += names

    async def add_request_async(self, request) -> None:
        """Step for a while, together, of which word comes late."""
        assert not self.running, "a step beside a call"

        async def step() -> None:
            await asyncio.sleep(0.01)
            self.engines_running = True
            await asyncio.sleep(0.1)
            self.engines_running = False

        self.stepping = asyncio.ensure_future(step())


async def values_of(workers: Workers, count: int, batch_size: int = 8, between=None) -> list[float]:
    """Return the values of a stream in their order; ``between`` is called with the number of those
    that are there.
    """
    stream = NonceStream(workers.client, SPEC, range(count), batch_size)
    await stream.open()
    values: list[float] = []
    while (batch := await stream.next()) is not None:
        values += batch.tolist()
        if between is not None:
            await between(len(values))
    await stream.close()
    return values


def config(**changed):
    """The settings that are read of a vLLM configuration, as they are by default."""
    values = {
        "scheduler.max_num_batched_tokens": 64,
        "scheduler.max_num_seqs": 16,
        "cache_config": SimpleNamespace(),
    }
    values |= {"model.dtype": torch.float32, "model.get_hidden_size": lambda: 16}
    values |= dict.fromkeys(("model.enable_sleep_mode", "model.uses_mrope"), False)
    divisions = ("pipeline", "tensor", "data")
    values |= dict.fromkeys((f"parallel.{name}_parallel_size" for name in divisions), 1)
    values |= {"parallel.distributed_executor_backend": "mp"}
    values |= dict.fromkeys(("parallel.enable_eplb", "parallel.use_ubatching"), False)
    values |= {
        "compilation.static_forward_context": {},
        "compilation.pass_config": SimpleNamespace(enable_sp=False),
    }
    values |= dict.fromkeys(("speculative_config", "lora_config", "kv_transfer_config"))
    return settings_of_vllm(values | changed)


class FullAttentionSpec: ...


class MambaSpec: ...


CPU = torch.device("cpu")
V2_RUNNER = type("GPUModelRunner", (SimpleNamespace,), {"__module__": "vllm.v1.worker.gpu.runner"})
STAGES = {"parallel.pipeline_parallel_size": 2}


def runner(
    config,
    specs=(FullAttentionSpec,),
    backend: str = "CPU_ATTN",
    shapes=((9, 2, 4, 8), (9, 2, 4, 8)),
    device=CPU,
    kind=SimpleNamespace,
):
    """A model runner with one attention layer per shape of cache."""
    names = [f"layer{index}" for index in range(len(shapes))]
    known = config.compilation_config.static_forward_context
    known |= {
        name: SimpleNamespace(kv_cache=torch.ones(shape))
        for name, shape in zip(names, shapes, strict=True)
    }
    group = SimpleNamespace(backend=SimpleNamespace(get_name=lambda: backend), layer_names=names)
    groups = SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec()) for spec in specs]
    )
    model = SimpleNamespace()
    return kind(kv_cache_config=groups, attn_groups=[[group]], model=model, device=device)


def throttled(chat: int, **settings) -> Throttle:
    """A throttle over an engine with so many requests of clients."""
    throttle = Throttle(
        ThrottleSettings(**settings), lambda: throttle.chat_now + throttle.in_flight, 16
    )
    throttle.chat_now = chat
    return throttle


def test_chat_lowers_the_limit_and_an_idle_or_exclusive_engine_raises_it():
    assert throttled(0, chat_in_flight=2, quiet=0.0, in_flight=9).limit == 9
    assert throttled(1, chat_in_flight=2, in_flight=9).limit == 2
    assert [throttled(1, mode="exclusive", **given).limit for given in ({"in_flight": 9}, {})] == [
        9,
        16,
    ]


async def test_nonces_over_the_limit_wait_until_one_leaves():
    throttle = throttled(1, chat_in_flight=1, share=1.0)
    await throttle.admit()
    waiting = asyncio.ensure_future(throttle.admit())
    await asyncio.sleep(0.02)
    assert throttle.in_flight == 1
    throttle.leave()
    await asyncio.wait_for(waiting, 5)
    assert throttle.in_flight == 1


async def test_beside_chat_a_burst_leaves_before_the_next_and_rests_in_between():
    throttle = throttled(3, chat_in_flight=2, share=1e-6)
    await throttle.admit()
    await throttle.admit()
    throttle.leave()
    assert not throttle.may_start()  # one of two has left, and the burst is not over
    await asyncio.sleep(0.002)
    throttle.leave()
    assert not throttle.may_start()


async def test_exclusive_mode_waits_for_chat_and_no_longer_than_its_deadline():
    throttle = throttled(1, mode="exclusive", drain=0.05)
    assert not await throttle.drained()
    waiting = asyncio.ensure_future(throttle.drained())
    throttle.chat_now = 0
    assert await waiting


def test_a_call_grows_to_the_time_that_chat_may_wait_and_not_beyond():
    sizer = CallSizer(batch=24)
    counts = []
    for _ in range(16):
        counts.append(sizer.next(0.1, MOST))
        sizer.ran(counts[-1], counts[-1] * 0.001)
    assert counts[:5] == [1, 2, 4, 8, 16]
    assert counts[-1] == 96  # of the hundred nonces that fit, whole passes
    sizer.seconds = 1.0
    assert sizer.next(0.1, MOST) == 1
    sizer.seconds = 1e-9
    sizer.nonces = 10 * MOST
    assert sizer.next(0.1, MOST) == MOST - MOST % 24
    assert sizer.next(0.1, 5) == 4


@pytest.fixture(autouse=True)
def no_sampling_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assay.poc.vllm.nonce_streams.sampling_parameters", lambda: None)


@pytest.mark.parametrize("broken", [False, True])
async def test_engines_that_step_together_have_no_call_beside_a_step(broken: bool):
    workers = Workers(engines=2, together=True, quiet=0.01)
    workers.broken = broken  # so that every nonce is a request in the end

    async def chat() -> None:
        for _ in range(4):
            workers.chat += 1
            await workers.engine_core.add_request_async("chat")
            workers.chat -= 1
            await asyncio.sleep(0.25)
            await workers.pause_scheduler_async()

    chatting = asyncio.ensure_future(chat())
    assert await values_of(workers, 1203) == list(range(1203))
    await chatting
    assert sorted(chain(*workers.called)) != []
    assert workers.client.direct.in_flight == 0
    if not broken:
        assert await values_of(workers, 203) == list(range(203))
        assert len(workers.requested) < 1203


async def test_no_call_runs_before_a_request_that_was_given_up_in_its_first_step_has_ended(
    monkeypatch: pytest.MonkeyPatch,
):
    workers = Workers(engines=2, together=True)
    workers.reqs_in_flight["chat"] = b"engine"
    admitting = asyncio.ensure_future(workers.client.direct.admit(CallSizer(batch=4)))
    with monkeypatch.context() as patch:
        patch.setattr("assay.poc.vllm.direct_path.TICK", 0)
        for _ in range(100):
            await asyncio.sleep(0)
    assert not admitting.done()
    workers.reqs_in_flight.clear()
    assert await admitting > 0


async def test_no_call_runs_beside_a_step_of_which_word_comes_late_however_many_streams_look():
    workers = Workers(engines=2, together=True)
    await workers.engine_core.add_request_async("chat")

    async def admit() -> None:
        direct = workers.client.direct
        direct.leave(await direct.admit(CallSizer(batch=4)))
        assert workers.stepping.done()

    await asyncio.gather(*(admit() for _ in range(4)))


async def test_nonces_are_requests_where_engines_do_not_come_to_rest(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("assay.poc.vllm.direct_path.TICK", 0)
    workers = Workers(engines=2, together=True)
    workers.reqs_in_flight["of a dead engine"] = b"engine"
    assert await values_of(workers, 3) == [0, 1, 2]
    assert workers.requested == [0, 1, 2]
    assert "do not come to rest" in workers.client.direct.reason


async def test_a_request_whose_client_leaves_while_it_waits_for_a_call_is_given_up():
    workers = Workers(engines=2, together=True)
    direct = workers.client.direct
    admitted = await direct.admit(CallSizer(batch=4))
    adding = asyncio.ensure_future(
        workers.engine_core.add_request_async(SimpleNamespace(request_id="chat"))
    )
    await asyncio.sleep(0)
    adding.cancel()
    await asyncio.wait({adding})
    assert adding.cancelled()
    assert workers.given_up == ["chat"]
    direct.leave(admitted)
    assert await direct.admit(CallSizer(batch=4)) > 0


@pytest.mark.parametrize("engines", [1, 2, 3])
async def test_without_chat_all_nonces_run_in_calls_of_which_every_engine_has_an_equal_share(
    engines: int,
):
    workers = Workers(engines=engines)
    assert await values_of(workers, 203) == list(range(203))
    assert workers.requested == []
    assert sorted(chain(*workers.called)) == list(range(203))
    direct = workers.client.direct
    assert direct.describe() == {"now": True, "reason": None, "calls": direct.calls, "nonces": 203}
    assert direct.in_flight == 0
    if engines == 1:
        assert list(chain(*workers.called)) == list(range(203))
        assert (workers.most, len(workers.called)) == (CALLS, direct.calls)
        return
    assert sorted(chain(*chain(*workers.dealt))) == list(range(203))
    assert len(workers.dealt) == direct.calls
    assert all(
        len(shares) == engines and len(shares[0]) - len(shares[-1]) <= 1 for shares in workers.dealt
    )


@pytest.mark.parametrize(("key", "ready"), [("key", True), ("key", False), ("gone", True)])
def test_engines_that_step_together_run_a_call_only_where_all_are_ready(
    monkeypatch: pytest.MonkeyPatch, key: str, ready: bool
):
    votes = []
    begun = []

    def vote(own: bool) -> bool:
        votes.append(own)
        return own and ready

    monkeypatch.setattr("assay.poc.vllm.worker.all_ready", vote)
    worker = WorkerExtension()
    worker.vllm_config = config(**{"parallel.data_parallel_index": 1})
    worker.model_runner = SimpleNamespace(device=CPU)
    worker.assay_hooks = SimpleNamespace(rows=Rows())
    worker.assay_passes = SimpleNamespace(
        begin=lambda *arguments: begun.append(arguments[1:]), together=True, ready=True
    )
    worker.assay_hooks.rows.open("key", SPEC)
    (reply,) = worker.assay_pass("1", key, [[1, 2], []], 4, True)
    assert votes == [key == "key"]
    if ready and key == "key":
        assert begun == [([], 4, [1, 2])]
        assert reply == {"call": "1"}
    else:
        assert begun == []
        assert reply == {"call": "1", "error": "an engine is not ready for the call"}


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

    def begin(spec, nonces, batch, longest):
        happened.append(("queued", nonces))
        if nonces == [3]:
            raise RuntimeError("no memory")
        return Values(nonces)

    worker = WorkerExtension()
    rows = Rows()
    worker.vllm_config = config()
    worker.model_runner = SimpleNamespace(device=CPU)
    worker.assay_hooks = SimpleNamespace(rows=rows)
    worker.assay_passes = SimpleNamespace(begin=begin, together=False)
    rows.open("key", SPEC)
    replies = [worker.assay_pass(str(nonce), "key", [[nonce]], 1, False) for nonce in (1, 2, 3)]
    assert replies[0] == []
    assert [(each["call"], each["nonces"]) for each in replies[1]] == [("1", [1])]
    assert replies[2] == [{"call": "2", "error": "RuntimeError: an error of the device"}]
    assert worker.assay_pass("4", "gone", [[4]], 1, False) == [
        {"call": "3", "error": "RuntimeError: no memory"}
    ]
    assert worker.assay_flush() == [{"call": "4", "error": "the stream has ended"}]
    assert worker.assay_flush() == []
    wanted = [("queued", [1]), ("queued", [2]), ("waited", [1]), ("queued", [3]), ("waited", [2])]
    assert happened == wanted


@pytest.mark.parametrize(("settings", "batch"), [({"path": "requests"}, 4), ({}, 0)])
async def test_where_calls_are_not_wanted_or_not_possible_all_nonces_are_requests(settings, batch):
    workers = Workers(batch=batch, **settings)
    assert await values_of(workers, 40) == list(range(40))
    assert (workers.called, sorted(workers.requested)) == ([], list(range(40)))
    described = workers.client.direct.describe()
    assert (described["now"], described["reason"]) == (
        False,
        "a reason" if not batch else "ASSAY_VLLM_PATH=requests",
    )


async def test_workers_never_hold_the_rows_of_a_large_batch():
    workers = Workers(path="requests")
    assert await values_of(workers, 2500, batch_size=2000) == list(range(2500))
    assert workers.held == 0
    assert workers.most_held < 3 * COLLECTED


async def test_an_engine_that_dies_fails_its_nonces_in_words():
    workers = Workers()
    workers.dead = True
    with refuses(ModelError, "an engine that dies fails its nonces in words"):
        await values_of(workers, 64)


async def test_values_that_the_workers_have_lost_are_computed_again():
    workers = Workers()

    async def lose(done: int) -> None:
        if done == 40:
            workers.begun.clear()

    assert await values_of(workers, 64, between=lose) == list(range(64))
    assert workers.client.direct.in_flight == 0


async def test_a_stream_that_is_closed_does_not_take_along_the_values_of_another():
    workers = Workers()
    closed = NonceStream(workers.client, SPEC, range(2**40), 8)
    await closed.open()
    others = asyncio.ensure_future(values_of(workers, 400))
    for _ in range(5):
        await closed.next()
    await closed.close()
    assert await others == list(range(400))
    assert workers.requested == []
    assert workers.client.direct.in_flight == workers.throttle.in_flight == 0


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({}, None),
        ({"model.uses_mrope": True}, None),
        ({"model.uses_mrope": True, "device": torch.device("cuda")}, "several dimensions"),
        ({"speculative_config": object()}, "speculative"),
        ({"lora_config": object()}, "lora"),
        ({"kv_transfer_config": object()}, "kv-transfer"),
        ({"model.enable_sleep_mode": True}, "sleep"),
        (STAGES, "stages"),
        (STAGES | {"kind": V2_RUNNER}, None),
        (
            STAGES | {"kind": V2_RUNNER, "parallel.distributed_executor_backend": "ray"},
            "stages over Ray",
        ),
        ({"parallel.data_parallel_size": 2}, None),
        ({"parallel.data_parallel_size": 2, "parallel.tensor_parallel_size": 2}, "together"),
        ({"parallel.enable_eplb": True}, "eplb"),
        ({"parallel.use_ubatching": True}, "dbo"),
        ({"scheduler.max_num_batched_tokens": 7}, "longer than a step"),
        ({"specs": (FullAttentionSpec, FullAttentionSpec)}, "2 kinds"),
        ({"specs": (MambaSpec,)}, "MambaSpec"),
        ({"backend": "FLASHINFER"}, "FLASHINFER"),
        ({"shapes": ((9, 2, 4, 8), (9, 2, 4, 16))}, "several forms"),
        ({"shapes": ((2, 9, 4, 2, 8),)}, "several forms"),
    ],
)
def test_settings_and_models_under_which_nonces_stay_requests_are_named(
    changed: dict, word: str | None
):
    of_runner = {
        name: changed.pop(name)
        for name in ("specs", "backend", "shapes", "device", "kind")
        if name in changed
    }
    made = config(**changed)
    found = direct_path_blocker(runner(made, **of_runner), made, SPEC)
    assert (word in found) if word else found is None
