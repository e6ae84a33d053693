"""Engines with stand-ins for vLLM: what becomes of nonces when it dies, ends or does not start, and
replays.
"""

import asyncio
import gc
import os
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal

from assay.errors import EngineEnded, ModelError, UsageError
from assay.poc import Round, get_pipeline
from assay.poc.responses.prefill import PromptAndOutput
from assay.poc.vllm import rows as _rows
from assay.poc.vllm.client import Client, call_workers
from assay.poc.vllm.rows import Spec
from assay.poc.vllm.throttle import Throttle, ThrottleSettings
from assay.poc.vllm.vllm_engine import RequestEngine, VLLMEngine
from assay.poc.vllm.vllm_prefill import FIXED, VLLMPrefill
from assay.poc.vllm.vllm_start import CPU_KV_BYTES
from tests.vllm.conftest import settings_of_vllm
from tests.waiting import until
from tests.wordings import refuses

SPEC = Spec(Round(block_hash="b", public_key="k", seq_len=8), get_pipeline("poc-2.0"))


class DyingLLM:
    """An ``AsyncLLM`` whose workers answer until a call, and whose requests fail, or never end."""

    errored = False
    vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(policy="priority"))

    def __init__(self, error: Exception | None, dies_at: str = "") -> None:
        self.error = error
        self.dies_at = dies_at
        self.called: list[str] = []
        self.asked = 0
        self.given_up = 0

    async def collective_rpc(self, method: str, args=()) -> list:
        self.called.append(method)
        if method == self.dies_at:
            raise RuntimeError("EngineCore encountered an issue")
        return [None]

    async def generate(self, prompt, sampling, name: str, priority: int):
        self.asked += 1
        try:
            await asyncio.sleep(0 if self.error else 3600)
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        raise self.error
        yield


@pytest.fixture
def loop():
    """An event loop in a thread of its own, and the errors that it logged."""
    logged: list[str] = []
    with start_blocking_portal() as portal:
        made = portal.call(asyncio.get_running_loop)
        made.set_exception_handler(lambda _, context: logged.append(context["message"]))
        yield made, logged


def engine_on(llm: DyingLLM, loop, monkeypatch: pytest.MonkeyPatch) -> RequestEngine:
    monkeypatch.setattr("assay.poc.vllm.nonce_streams.sampling_parameters", lambda: None)
    client = Client(llm, Throttle(ThrottleSettings(in_flight=4, path="requests"), lambda: 0, 4))
    client.description = {"dtype": "float32", "hidden_size": 16, "vocab_size": 32}
    client.loop = loop
    client.positions = 64
    client.version = "0"
    return RequestEngine(client, batch_size=4, seq_len=8)


@pytest.mark.parametrize(
    ("llm", "words"),
    [
        (DyingLLM(RuntimeError("EngineCore died")), "EngineCore died"),
        (DyingLLM(None, dies_at="assay_open"), "did not run assay_open: RuntimeError: EngineCore"),
    ],
)
def test_an_engine_that_dies_fails_its_nonces_in_words_and_logs_no_trace(
    llm: DyingLLM, words: str, loop, monkeypatch: pytest.MonkeyPatch
):
    made, logged = loop
    engine = engine_on(llm, made, monkeypatch)
    with pytest.raises(ModelError, match=words):
        next(engine.run(SPEC.round.inputs(range(64)), SPEC.pipeline))
    gc.collect()  # asyncio logs errors that were not looked at when their tasks are freed
    assert logged == []
    assert engine.client.throttle.in_flight == 0


async def test_a_call_ends_with_the_engine_that_dies_under_it():
    """vLLM leaves the call waiting: seen when a worker of two was killed."""

    class LLM:
        errored = False

        async def collective_rpc(self, method: str, args: tuple):
            await asyncio.sleep(0)
            self.errored = True
            await asyncio.sleep(3600)

    with pytest.raises(EngineEnded, match="died and did not answer assay_open"):
        await asyncio.wait_for(call_workers(LLM(), "assay_open"), 60)


@pytest.mark.parametrize(
    ("devices", "named"),
    [(["one"], "one"), (["one", "one"], "one"), (["two", "one", "two"], "one + two")],
)
async def test_a_build_names_the_devices_of_all_workers(devices, named: str):
    class LLM:
        errored = False
        vllm_config = settings_of_vllm({"model.max_model_len": 65, "scheduler.policy": "fcfs"})

        async def collective_rpc(self, method: str, args: tuple):
            return [{"device": device} for device in devices]

    client = Client(LLM(), Throttle(ThrottleSettings(), lambda: 0, 4))
    await client.install()
    assert client.description["device"] == named


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"batch_size": 0}, "batch size 0"),
        ({"seq_len": 0}, "seq_len 0"),
        ({"seq_len": 64}, "seq_len 64 on this vLLM"),
    ],
)
def test_a_shape_that_cannot_run_is_refused_before_vllm_starts(
    shape, words: str, monkeypatch: pytest.MonkeyPatch
):
    config = settings_of_vllm({"model.max_model_len": 64, "scheduler.enable_chunked_prefill": True})
    monkeypatch.setattr("assay.poc.vllm.vllm_engine.check_installed", lambda: "0.32.0")
    monkeypatch.setattr("assay.poc.vllm.vllm_engine.configure", lambda *_, **__: config)
    with pytest.raises(UsageError, match=words):
        VLLMEngine("reference:qwen3", **shape)


def test_an_engine_that_ends_gives_up_its_nonces_and_keeps_nobody_waiting(
    loop, monkeypatch: pytest.MonkeyPatch
):
    made, logged = loop
    llm = DyingLLM(None)
    engine = engine_on(llm, made, monkeypatch)
    outputs = engine.run(SPEC.round.inputs(range(64)), SPEC.pipeline)
    raised = []

    def work() -> None:
        try:
            next(outputs)
        except ModelError as error:
            raised.append(error)

    waiting = threading.Thread(target=work)
    waiting.start()
    until(lambda: llm.asked == 4)
    asyncio.run_coroutine_threadsafe(engine.client.end(), made).result(10)
    waiting.join(10)
    assert [error.seen for error in raised] == ["the engine of vLLM has ended"]
    assert (llm.given_up, llm.called) == (4, ["assay_open", "assay_close"])
    assert engine.client.throttle.in_flight == 0
    with refuses(ModelError, "an engine that ends gives up its nonces and keeps nobody waiting"):
        next(engine.run(SPEC.round.inputs(range(64)), SPEC.pipeline))
    gc.collect()
    assert logged == []


@pytest.mark.parametrize(
    ("said", "dtype", "kernels"),
    [
        ({}, "bfloat16", ("compiled",)),
        ({"cache": "fp8_e4m3-cache"}, "bfloat16+fp8_e4m3-cache", ("compiled",)),
        (
            {"format": "int8-rows", "products": ["CPUInt8 onednn"]},
            "int8-rows",
            ("compiled", "CPUInt8 onednn"),
        ),
        ({"experts_over": ["dp 2"]}, "bfloat16", ("dp 2", "compiled")),
    ],
)
def test_the_fingerprint_names_the_kernels_and_the_formats_of_weights_and_cache(
    said: dict, dtype: str, kernels: tuple[str, ...], loop, monkeypatch: pytest.MonkeyPatch
):
    engine = engine_on(DyingLLM(None), loop[0], monkeypatch)
    worker = {
        "runner": "v2",
        "device": "H200",
        "attention": "FLASH_ATTN",
        "threads": 0,
        "eager": False,
        "cache": "",
    }
    worker |= {
        "tensor_parallel": 2,
        "pipeline_parallel": 1,
        "dtype": "bfloat16",
        "format": "",
        "products": [],
    }
    engine.client.description |= worker | {"experts_over": []} | said
    assert (engine.fingerprint.dtype, engine.fingerprint.kernels) == (
        dtype,
        ("runner v2", "tp 2", "pp 1", *kernels),
    )
    assert engine.fingerprint.as_dict()["library"] == ", ".join(
        ("vllm 0", *engine.fingerprint.kernels)
    )


def test_the_fingerprint_says_over_what_experts_are_spread():
    said = {(1, 2, True): ["ep 2"], (2, 1, False): ["dp 2"], (2, 2, True): ["dp 2", "ep 4"]}
    for engines, workers, dealt in ((1, 1, False), (1, 2, False), (1, 1, True), *said):
        sizes = {
            "data_parallel_size": engines,
            "tensor_parallel_size": workers,
            "enable_expert_parallel": dealt,
        }
        assert _rows.experts_over(SimpleNamespace(**sizes)) == said.get(
            (engines, workers, dealt), []
        )


class Engine:
    """What stands in for vLLM's ``LLM``: its workers reply as they are told, and it notes that it
    was ended.
    """

    def __init__(self, reply: Any) -> None:
        self.reply = reply
        self.ended = 0
        self.llm_engine = SimpleNamespace(
            engine_core=self, vllm_config=SimpleNamespace(model_config=None)
        )

    def collective_rpc(self, name: str, args: tuple = ()) -> Any:
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply

    def shutdown(self) -> None:
        self.ended += 1


OF_A_REPLAY = frozenset(
    {
        "model",
        "dtype",
        "logprobs_mode",
        "max_logprobs",
        "enable_prefix_caching",
        "skip_tokenizer_init",
        "worker_extension_cls",
    }
)
"""Options that every replay sets."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options with which an engine was started, and the engine that a test puts there, on a
    machine without it.
    """
    found: dict[str, Any] = {}

    def start(**options: Any) -> Any:
        found["options"] = {
            name: value for name, value in options.items() if name not in OF_A_REPLAY
        }
        return found["engine"]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=start))
    monkeypatch.setattr("assay.poc.vllm.vllm_prefill.check_installed", lambda: "0.32.0")
    monkeypatch.setattr("assay.poc.vllm.vllm_start.runs_on_cpu", lambda: True)
    return found


@pytest.mark.parametrize("name", FIXED)
def test_an_option_that_says_what_a_replay_computes_is_refused_by_its_flag(
    name: str, started: dict[str, Any]
):
    with pytest.raises(UsageError) as refusal:
        VLLMPrefill("reference:qwen3", dtype="float32", **{name: "other"})
    assert started == {}
    flag = "--" + name.replace("_", "-")
    assert refusal.value.seen.startswith(f"{flag} ")
    assert f"leave {flag} out of ASSAY_VLLM_ARGS" in refusal.value.do


def test_an_engine_that_replays_may_be_given_its_memory(started: dict[str, Any]):
    for options in (
        {},
        {"gpu_memory_utilization": 0.2},
        {"kv_cache_memory_bytes": 5, "max_num_seqs": 2},
    ):
        started["engine"] = Engine([[]])
        with VLLMPrefill("reference:qwen3", dtype="float32", **options):
            assert started["engine"].ended == 0
        assert started["engine"].ended == 1
        wanted = (
            {} if "gpu_memory_utilization" in options else {"kv_cache_memory_bytes": CPU_KV_BYTES}
        )
        assert started["options"] == wanted | options


def test_an_engine_whose_workers_do_not_answer_is_ended(started: dict[str, Any]):
    started["engine"] = Engine(RuntimeError("gone"))
    with refuses(ModelError, "an engine whose workers do not answer is ended"):
        VLLMPrefill("reference:qwen3", dtype="float32")
    assert started["engine"].ended == 1


@pytest.fixture
def replaying(started: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[VLLMPrefill]:
    """An engine of 8192 positions that knows one token at each, and of a response its first
    state.
    """
    engine = started["engine"] = Engine([])
    sizes = SimpleNamespace(max_model_len=8192, enable_chunked_prefill=True)
    config = SimpleNamespace(model_config=sizes, scheduler_config=sizes)
    monkeypatch.setattr(engine.llm_engine, "vllm_config", config)
    monkeypatch.setattr("assay.poc.vllm.vllm_prefill.check_numbers", lambda config: None)
    monkeypatch.setattr(sys.modules["vllm"], "SamplingParams", dict, raising=False)
    with VLLMPrefill("reference:qwen3", dtype="float32") as opened:
        state = bytes(4 * opened.model.hidden_size)

        def generate(prompts: list[Any], parameters: list[Any], use_tqdm: bool) -> list[Any]:
            names = [str(place) for place in range(len(prompts))]
            started["sizes"].append(len(names))
            engine.reply = [{f"{name}-ab": state for name in names}]
            row = {0: SimpleNamespace(logprob=0.0)}
            return [SimpleNamespace(request_id=name, prompt_logprobs=[row]) for name in names]

        started["sizes"] = []
        monkeypatch.setattr(engine, "generate", generate, raising=False)
        yield opened


def test_long_responses_are_handed_to_an_engine_a_few_at_a_time(
    started: dict[str, Any], replaying: VLLMPrefill
):
    """VLLM describes a thousand tokens at every position, in 240 kB of objects."""
    responses = [PromptAndOutput((1,) * length, (2,)) for length in (4000, 4000, 4000, 8190, 9)]
    places = [place for place, _ in replaying.run(responses)]
    assert places == list(range(5))
    assert started["sizes"] == [2, 1, 1, 1]


def test_a_response_that_fills_the_positions_of_an_engine_is_refused_before_any_runs(
    started: dict[str, Any], replaying: VLLMPrefill
):
    responses = [PromptAndOutput((1,), (2,)), PromptAndOutput((1,) * 8191, (2,))]
    with refuses(
        UsageError, "a response that fills the positions of an engine is refused before any runs"
    ):
        next(replaying.run(responses))
    assert started["sizes"] == []


@pytest.mark.parametrize("chosen", [None, "fork"])
def test_a_replay_on_a_gpu_starts_its_processes_anew_unless_the_user_chose_another_way(
    chosen: str | None, started: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    for name in ("VLLM_WORKER_MULTIPROC_METHOD", "TRITON_F32_DEFAULT"):
        monkeypatch.setenv(name, "")  # has what the start sets undone
        monkeypatch.delenv(name)
    if chosen:
        monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", chosen)
    monkeypatch.setattr("assay.poc.vllm.vllm_start.runs_on_cpu", lambda: False)
    started["engine"] = Engine([[]])
    with VLLMPrefill("reference:qwen3", dtype="float32", max_num_seqs=2):
        assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == (chosen or "spawn")
    assert os.environ["TRITON_F32_DEFAULT"] == "ieee"
    assert started["options"] == {"max_num_seqs": 2}
