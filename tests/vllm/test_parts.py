"""The parts that need no vLLM: names, rows, throttle, middleware, settings."""

import asyncio
import dataclasses
import gc
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay import streams
from assay.errors import ModelError, UsageError
from assay.poc import Round, get_pipeline
from assay.poc.engines._base import noise_inputs
from assay.poc.engines.vllm import RequestEngine, ThrottleSettings, WorkerExtension, _client, _engine, _extension, _rows
from assay.poc.engines.vllm._compatibility import runner_kind
from assay.poc.engines.vllm._extension import Hooks
from assay.poc.engines.vllm._rows import Rows, Spec, new_key, packed, request_id, split_id, unpacked
from assay.poc.engines.vllm._throttle import Throttle
from assay.poc.engines.vllm._worker import Chunk, chunks
from assay.poc.protocol._transforms import weighted_sum
from assay.poc.serving import PluginSettings, plugin
from assay.poc.serving._plugin import ChatBarrier
from tests.waiting import until

SPEC = Spec(Round(block_hash="b", public_key="k", seq_len=8), get_pipeline("poc-2.0"))


def test_a_request_id_leads_back_to_key_and_nonce_with_or_without_the_suffix_of_vllm():
    key = new_key()
    for nonce in (0, 7, 2**53 - 1):
        assert split_id(request_id(key, nonce)) == (key, nonce)
        assert split_id(f"{request_id(key, nonce)}-0123abcd") == (key, nonce)


@given(st.text(max_size=60))
def test_other_request_ids_are_nobodys(text: str):
    found = split_id(text)
    assert found is None or (found[0].startswith("assay-") and found[1] >= 0)
    assert split_id(f"chatcmpl-{text}") is None


def test_keys_cannot_be_guessed():
    assert len({new_key() for _ in range(100)}) == 100
    assert len(new_key()) >= 32 + len("assay-")


def rows_with(count: int) -> Rows:
    rows = Rows()
    rows.open("a", SPEC)
    for nonce in range(count):
        rows.get("a").fill(nonce)
        rows.get("a").put(nonce, torch.tensor([float(nonce)]))
    return rows


def test_rows_come_back_once_and_leave_nothing():
    rows = rows_with(3)
    found, states = rows.get("a").take([2, 0, 9])
    assert found == [2, 0]
    assert [state.item() for state in states] == [2.0, 0.0]
    assert rows.get("a").take([2])[0] == []
    rows.close("a")
    assert rows.counts() == {"streams": 0, "rows": 0, "filled": 0, "dropped": 1, "failed": 0}


def test_rows_that_nobody_collects_are_bounded():
    rows = rows_with(_rows.MAX_ROWS + 10)
    counts = rows.counts()
    assert counts["rows"] == counts["filled"] == _rows.MAX_ROWS
    assert counts["dropped"] == 10


def test_streams_that_nobody_closes_are_bounded_and_the_newest_stay():
    rows = Rows()
    for number in range(_rows.MAX_STREAMS + 5):
        rows.open(str(number), SPEC)
    assert rows.counts()["streams"] == _rows.MAX_STREAMS
    assert rows.get("0") is None
    assert rows.get(str(_rows.MAX_STREAMS + 4)) is not None


def test_streams_expire(monkeypatch: pytest.MonkeyPatch):
    rows = rows_with(1)
    monkeypatch.setattr(_rows, "EXPIRY", -1.0)
    rows.open("b", SPEC)
    assert rows.get("a") is None


def test_a_request_is_found_by_the_key_of_an_open_stream_only():
    rows = Rows()
    key = new_key()
    rows.open(key, SPEC)
    assert rows.find(f"{request_id(key, 5)}-0123abcd") == (rows.get(key), 5)
    for other in (request_id(new_key(), 5), "chatcmpl-1", ".0", ""):
        assert rows.find(other) is None


@given(st.integers(0, 20), st.integers(1, 20), st.integers(1, 20))
def test_exactly_one_chunk_of_a_prompt_ends_it(computed: int, length: int, prompt: int):
    chunk = Chunk("id", 0, length, computed, prompt)
    assert chunk.ends_prompt == (computed < prompt <= computed + length)
    assert 0 <= chunk.in_prompt <= length
    assert chunk.in_prompt == len(set(range(computed, computed + length)) & set(range(prompt)))


def v1_runner(lengths: dict[str, int], computed: list[int], prompts: list[int]):
    states = torch.arange(float(sum(lengths.values()))).unsqueeze(1)
    scheduled = SimpleNamespace(num_scheduled_tokens=lengths)
    batch = SimpleNamespace(req_ids=list(lengths), num_computed_tokens_cpu=computed, num_prompt_tokens=prompts)
    state = SimpleNamespace(scheduler_output=scheduled, hidden_states=states)
    return SimpleNamespace(execute_model_state=state, input_batch=batch)


def test_chunks_of_a_step_lie_one_after_the_other():
    runner = v1_runner({"a": 3, "b": 1, "c": 4}, [0, 9, 2], [3, 5, 6])
    states_ND, found = chunks(runner)
    assert states_ND is not None
    listed = list(found)
    assert [(c.request_id, c.start, c.length, c.ends_prompt) for c in listed] == [
        ("a", 0, 3, True),
        ("b", 3, 1, False),
        ("c", 4, 4, True),
    ]


@pytest.mark.parametrize("state", [None, SimpleNamespace(hidden_states=None), SimpleNamespace(hidden_states={})])
def test_a_rank_without_states_has_no_chunks(state):
    states_ND, found = chunks(SimpleNamespace(execute_model_state=state))
    assert states_ND is None
    assert list(found) == []


def test_the_runner_is_told_by_its_module():
    kind = type("GPUModelRunner", (), {"__module__": "vllm.v1.worker.gpu.model_runner"})
    assert runner_kind(kind()) == "v2"
    assert runner_kind(type("CPU", (kind,), {"__module__": "vllm.v1.worker.cpu.model_runner"})()) == "v2"
    assert runner_kind(type("Old", (), {"__module__": "vllm.v1.worker.gpu_model_runner"})()) == "v1"


def test_names_of_the_extension_cannot_clash_with_those_of_a_worker():
    own = [name for name in vars(WorkerExtension) if not name.startswith("__")]
    assert own
    assert all(name.startswith("assay_") for name in own)


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
        self.throttle = Throttle(ThrottleSettings(**settings), lambda: self.chat + self.throttle.in_flight, 16)


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


def test_exclusive_mode_waits_for_chat_and_no_longer_than_its_deadline():
    async def scenario() -> tuple[bool, bool]:
        engine = Engine(mode="exclusive", drain=0.05)
        engine.chat = 1
        late = await engine.throttle.drained()
        waiting = asyncio.ensure_future(engine.throttle.drained())
        engine.chat = 0
        return late, await waiting

    assert asyncio.run(scenario()) == (False, True)


def answers(app, path: str, method: str = "POST", root_path: str = "") -> int:
    """Return the status that an application answers with."""
    sent: list[dict] = []

    async def send(message) -> None:
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b""}

    scope = {"type": "http", "path": path, "method": method, "root_path": root_path}
    scope["headers"] = [(b"host", b"evil.example")]
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"]


async def served(scope, receive, send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


def test_the_barrier_stops_new_work_and_nothing_else():
    closed = [True]
    app = ChatBarrier(served, prefix="/api/v1/pow", closed=lambda: closed[0])
    assert answers(app, "/v1/chat/completions") == 503
    assert answers(app, "/v1/completions") == 503
    assert answers(app, "/v1/models", "GET") == answers(app, "/tokenize") == answers(app, "/api/v1/pow/stop") == 200
    closed[0] = False
    assert answers(app, "/v1/chat/completions") == 200


def test_a_middleware_under_a_prefix_leaves_other_routes_alone():
    from assay.poc.service.http import LocalOnly

    app = LocalOnly(served, prefix="/api/v1/pow")
    assert answers(app, "/api/v1/pow/status", "GET") == 403
    assert answers(app, "/v1/models", "GET") == 200


@pytest.mark.parametrize("root", ["", "/proxy"])
def test_a_root_path_opens_no_guard_and_closes_no_route(root: str):
    """A client may send the root path or leave it out: the router takes both."""
    from fastapi import FastAPI

    from assay.poc.service.http import LocalOnly
    from tests.poc.service.conftest import TestClient

    app = FastAPI()
    app.root_path = root  # as vLLM sets it from --root-path
    for path in ("/api/v1/pow/status", "/api/v1/pow/stop", "/tokenize", "/v1/completions"):
        app.add_api_route(path, lambda: "served", methods=["GET", "POST"])
    app.add_middleware(ChatBarrier, prefix="/api/v1/pow", closed=lambda: True)
    app.add_middleware(LocalOnly, prefix="/api/v1/pow")
    here, evil = (TestClient(app, base_url=f"http://{host}") for host in ("127.0.0.1", "evil.example"))
    for before in {"", root}:
        assert evil.get(f"{before}/api/v1/pow/status").status_code == 403
        assert evil.post(f"{before}/api/v1/pow/stop").status_code == 403
        assert here.post(f"{before}/api/v1/pow/stop").status_code == 200
        assert here.post(f"{before}/tokenize").status_code == 200
        assert here.post(f"{before}/v1/completions").status_code == 503
        assert evil.get(f"{before}/v1/completions").status_code == 200


def test_settings_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    keys = tmp_path / "keys"
    keys.write_text("second-key-of-16-chars\n")
    environment = {
        "ASSAY_API_KEY": "first-key-of-16-chars",
        "ASSAY_API_KEY_FILE": str(keys),
        "ASSAY_DATA_DIR": str(tmp_path),
        "ASSAY_CALLBACK_INTERVAL": "0.5",
        "ASSAY_MAX_NONCES": "7",
        "ASSAY_ALLOW_PRIVATE_CALLBACKS": "1",
        "ASSAY_VLLM_SHARE": "0.5",
        "ASSAY_VLLM_MODE": "exclusive",
        "ASSAY_VLLM_INPUTS": "sent",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    read = PluginSettings()
    assert read.api_keys == ("first-key-of-16-chars", "second-key-of-16-chars")
    assert (read.callback_interval, read.max_nonces, read.drain) == (0.5, 7, 2.0)
    assert read.allow_private_callbacks is True
    assert read.throttle == ThrottleSettings(share=0.5, mode="exclusive")
    assert read.vllm_inputs == "sent"
    monkeypatch.setenv("ASSAY_DRAIN", "9")
    assert PluginSettings().drain == 9.0


def test_every_setting_of_the_throttle_has_a_name_in_the_environment():
    for field in dataclasses.fields(ThrottleSettings):
        assert PluginSettings.environment_name(f"vllm_{field.name}") == f"ASSAY_VLLM_{field.name.upper()}"


@pytest.mark.parametrize(
    "wrong",
    [
        {"ASSAY_MAX_NONCES": "many"},
        {"ASSAY_ALLOW_PRIVATE_CALLBACKS": "perhaps"},
        {"ASSAY_VLLM_SHARE": "2"},
        {"ASSAY_VLLM_MODE": "greedy"},
        {"ASSAY_VLLM_INPUTS": "guessed"},
        {"ASSAY_API_KEY": "short"},
        {"ASSAY_API_KEY_FILE": "/no/such/file"},
    ],
)
def test_settings_that_are_wrong_are_refused_in_words(wrong, monkeypatch: pytest.MonkeyPatch):
    ((name, value),) = wrong.items()
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="an API key of fewer" if value == "short" else name):
        PluginSettings()


def test_a_port_that_others_reach_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ASSAY_DATA_DIR", str(tmp_path))
    for host in (None, "0.0.0.0", "203.0.113.7"):
        app = SimpleNamespace(state=SimpleNamespace(args=SimpleNamespace(host=host, uds=None)))
        with pytest.raises(UsageError, match="without a key"):
            plugin().attach_router(app)


@pytest.mark.parametrize("shape", [(3,), (3, 12)])
def test_values_cross_the_process_as_bytes(shape):
    values = np.arange(np.prod(shape)).reshape(shape).astype(np.float16 if len(shape) > 1 else np.float32)
    reply = packed([5, 6, 9], values)
    assert reply == {
        "nonces": [5, 6, 9],
        "values": values.tobytes(),
        "dtype": str(values.dtype),
        "width": 12 * (values.ndim - 1),
    }
    found = unpacked({"failed": {}} | reply)
    assert sorted(found) == [5, 6, 9]
    np.testing.assert_array_equal(found[6], values[1])
    assert unpacked({"failed": {}}) == {}


def test_new_nonces_of_a_step_get_their_own_inputs_however_they_are_grouped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_extension, "MAX_VALUES", 2 * 8 * 16)  # two nonces at once
    monkeypatch.setattr(_extension, "is_first_stage", lambda: True)
    steps: list[object] = []
    runner = SimpleNamespace(device=torch.device("cpu"), execute_model=steps.append, sample_tokens=None)
    model = SimpleNamespace(dtype=torch.float32, get_hidden_size=lambda: 16)
    hooks = Hooks(runner, SimpleNamespace(model_config=model))
    other = Spec(Round(block_hash="other", public_key="k", seq_len=8), get_pipeline("poc-2.0"))
    keys = {new_key(): SPEC, new_key(): other}
    for key, spec in keys.items():
        hooks.rows.open(key, spec)
    wanted = [(key, nonce) for nonce in range(5) for key in keys]
    requests = [
        SimpleNamespace(req_id=request_id(key, nonce), prompt_embeds=None, prompt_token_ids=[0] * (8 - (nonce == 3)))
        for key, nonce in wanted
    ]
    runner.execute_model(SimpleNamespace(scheduled_new_reqs=requests))
    assert len(steps) == 1
    assert all(list(hooks.rows.get(key).failed) == [3] for key in keys)
    backend = streams.get_backend("auto", "cpu")
    for (key, nonce), request in zip(wanted, requests, strict=True):
        assert (nonce in hooks.rows.get(key).filled) == (nonce != 3)
        if nonce != 3:
            alone = noise_inputs(backend, keys[key].round, [nonce], seq_len=8, hidden_size=16, dtype="float32")[0]
            assert torch.equal(request.prompt_embeds, alone)
            assert request.prompt_is_token_ids == [False] * 8


def test_a_stage_without_hidden_states_forgets_nonces_when_they_are_collected():
    runner = SimpleNamespace(device=torch.device("cpu"), execute_model=None, sample_tokens=None)
    model = SimpleNamespace(dtype=torch.float32, get_hidden_size=lambda: 16)
    hooks, key = Hooks(runner, SimpleNamespace(model_config=model)), new_key()
    hooks.rows.open(key, SPEC)
    hooks.rows.get(key).fill(3)
    hooks.rows.get(key).fail(4, "too long")
    assert hooks.collect(key, [3, 4]) == {"failed": {"4": "too long"}}
    assert hooks.rows.counts() == {"streams": 1, "rows": 0, "filled": 0, "dropped": 0, "failed": 0}


def test_chunks_of_a_step_are_summed_each_for_itself_however_they_are_grouped(monkeypatch: pytest.MonkeyPatch):
    """Three steps: whole prompts beside halves of others, in groups of two, with the states of a stranger between."""
    monkeypatch.setattr(_extension, "MAX_SUMMED", 2 * 8 * 16)
    runner = SimpleNamespace(device=torch.device("cpu"), execute_model=None, sample_tokens=lambda: None)
    model = SimpleNamespace(dtype=torch.float32, get_hidden_size=lambda: 16, get_vocab_size=lambda: 32)
    hooks = Hooks(runner, SimpleNamespace(model_config=model))
    round = Round(block_hash="b", public_key="k", seq_len=8, preset="hardened")
    key, spec = new_key(), Spec(round, get_pipeline("hardened"))
    hooks.rows.open(key, spec)
    states_BTD = torch.randn(5, 8, 16, generator=torch.Generator().manual_seed(0))
    weights_BT = hooks._transform(spec).weights(range(5), 8)
    steps = [[(0, 0, 8), (3, 0, 5), (1, 0, 8)], [(4, 0, 5), (2, 0, 8)], [(3, 5, 8), (4, 5, 8)]]
    for nonce in range(5):
        hooks.rows.get(key).fill(nonce)
    for step in steps:
        parts, start = [torch.full((3, 16), float("nan"))], 3
        found = [Chunk("stranger", 0, 3, 0, 3), Chunk(request_id(key, 77), 0, 3, 0, 8)]  # and one that was not filled
        for nonce, begin, end in step:
            parts.append(states_BTD[nonce, begin:end])
            found.append(Chunk(request_id(key, nonce), start, end - begin, begin, 8))
            start += end - begin
        left = torch.cat(parts), iter(found)
        monkeypatch.setattr(_extension, "chunks", lambda _, left=left: left)
        runner.sample_tokens()
    assert (hooks.errors, hooks.rows.counts()["failed"]) == (0, 0)
    nonces, rows = hooks.rows.get(key).take(range(5))
    assert nonces == list(range(5))
    torch.testing.assert_close(torch.stack(rows), weighted_sum(states_BTD, weights_BT), atol=1e-6, rtol=0)
    assert not hooks.rows.get(key).sums
    assert not hooks.rows.get(key).rows


class DyingLLM:
    """An ``AsyncLLM`` whose workers answer until a call, and whose requests fail, or never end."""

    vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(policy="priority"))

    def __init__(self, error: Exception | None, dies_at: str = "") -> None:
        self.error, self.dies_at = error, dies_at
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
    made, logged = asyncio.new_event_loop(), []
    made.set_exception_handler(lambda _, context: logged.append(context["message"]))
    thread = threading.Thread(target=made.run_forever, daemon=True)
    thread.start()
    yield made, logged
    made.call_soon_threadsafe(made.stop)
    thread.join()
    made.close()


def engine_on(llm: DyingLLM, loop, monkeypatch: pytest.MonkeyPatch) -> RequestEngine:
    monkeypatch.setattr(_client, "_sampling", lambda: None)
    client = _client.Client(llm, Throttle(ThrottleSettings(in_flight=4, path="requests"), lambda: 0, 4))
    client.description = {"dtype": "float32", "hidden_size": 16, "vocab_size": 32}
    return RequestEngine(client, loop, version="0", batch_size=4, seq_len=8, most_positions=64)


def test_an_engine_that_dies_fails_its_nonces_in_words_and_logs_no_trace(loop, monkeypatch: pytest.MonkeyPatch):
    made, logged = loop
    engine = engine_on(DyingLLM(RuntimeError("EngineCore died")), made, monkeypatch)
    with pytest.raises(ModelError, match="EngineCore died"):
        next(engine.outputs(SPEC.round, SPEC.pipeline, range(64)))
    gc.collect()  # asyncio logs errors that were not looked at when their tasks are freed
    assert logged == []
    assert engine._client.throttle.in_flight == 0


def test_an_engine_that_dies_in_a_call_of_its_workers_is_named_too(loop, monkeypatch: pytest.MonkeyPatch):
    engine = engine_on(DyingLLM(None, dies_at="assay_open"), loop[0], monkeypatch)
    with pytest.raises(ModelError, match="did not run assay_open: RuntimeError: EngineCore"):
        next(engine.outputs(SPEC.round, SPEC.pipeline, range(64)))


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ValueError("no such option"), UsageError, "options of vLLM: no such option"),
        (KeyError("rope_type"), ModelError, "vLLM does not start: KeyError: 'rope_type'"),
    ],
)
def test_what_vllm_cannot_read_is_named(error: Exception, kind, words: str, monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise error

    known = {
        "vllm": {"AsyncEngineArgs": lambda **_: SimpleNamespace(create_engine_config=fail)},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: True)},
        "vllm.v1.engine.async_llm": {"AsyncLLM": None},
    }
    for name, content in known.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    with pytest.raises(kind, match=words):
        asyncio.run(_engine._start("directory", None, {}, "vllm"))


def test_an_engine_that_ends_gives_up_its_nonces_and_keeps_nobody_waiting(loop, monkeypatch: pytest.MonkeyPatch):
    made, logged = loop
    llm = DyingLLM(None)
    engine = engine_on(llm, made, monkeypatch)
    outputs, raised = engine.outputs(SPEC.round, SPEC.pipeline, range(64)), []

    def work() -> None:
        try:
            next(outputs)
        except ModelError as error:
            raised.append(error)

    waiting = threading.Thread(target=work)
    waiting.start()
    until(lambda: llm.asked == 4)
    asyncio.run_coroutine_threadsafe(engine._client.end(), made).result(10)
    waiting.join(10)
    assert [error.seen for error in raised] == ["the engine of vLLM has ended"]
    assert (llm.given_up, llm.called) == (4, ["assay_open", "assay_close"])
    assert engine._client.throttle.in_flight == 0
    with pytest.raises(ModelError, match="has ended"):
        next(engine.outputs(SPEC.round, SPEC.pipeline, range(64)))
    gc.collect()
    assert logged == []


def test_the_controller_is_closing_before_vllm_ends_its_engine(loop):
    """As ``serve_http`` does it on SIGTERM: in a thread, before the application hears of it."""
    made, _ = loop
    mounted, seen = plugin(), []
    mounted.controller = SimpleNamespace(closing=threading.Event())
    client = _client.Client(DyingLLM(None), Throttle(ThrottleSettings(), lambda: 0, 4))

    def end(timeout: float) -> None:
        seen.append((mounted.controller.closing.is_set(), client.ended.done(), timeout))

    engine_client = SimpleNamespace(shutdown=end)
    made.call_soon_threadsafe(mounted._end_before, engine_client, SimpleNamespace(client=client, loop=made))
    until(lambda: engine_client.shutdown is not end)
    engine_client.shutdown(timeout=3)
    engine_client.shutdown(timeout=0)
    assert seen == [(True, True, 3), (True, True, 0)]


def test_the_fingerprint_names_the_kernels_and_a_cache_of_another_format(loop, monkeypatch: pytest.MonkeyPatch):
    engine = engine_on(DyingLLM(None), loop[0], monkeypatch)
    worker = {"runner": "v2", "device": "H200", "attention": "FLASH_ATTN", "threads": 0, "eager": False}
    engine._client.description |= worker | {"tensor_parallel": 2, "pipeline_parallel": 1, "cache": ["kv fp8"]}
    engine._client.description |= {"format": "", "products": []}
    fingerprint = engine.fingerprint
    assert fingerprint.kernels == ("runner v2", "tp 2", "pp 1", "compiled", "kv fp8")
    assert fingerprint.as_dict()["library"] == "vllm 0, runner v2, tp 2, pp 1, compiled, kv fp8"
    del engine.fingerprint
    engine._client.description["cache"] = []
    assert engine.fingerprint.as_dict()["library"] == "vllm 0, runner v2, tp 2, pp 1, compiled"  # as the first version
    del engine.fingerprint
    engine._client.description |= {"format": "int8-rows", "products": ["CPUInt8ScaledMMLinearKernel onednn"]}
    assert (engine.fingerprint.dtype, engine.fingerprint.kernels[-1]) == (
        "int8-rows",
        "CPUInt8ScaledMMLinearKernel onednn",
    )
