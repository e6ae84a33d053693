"""Recorded responses without vLLM: seeds, receipts, sketches, and the routes that name them."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from assay.errors import AssayError, ModelError, StorageError, UsageError
from assay.poc.protocol.transforms import sketch_states
from assay.poc.responses import Prompt, ResponseSeed, Sampling
from assay.poc.responses.receipts import Adapter, Receipt, ReceiptHeader, digest_adapter
from assay.poc.responses.sampling import step_seeds
from assay.poc.vllm.compatibility import check_responses
from assay.poc.vllm.preflight import PluginSettings, response_arguments
from assay.poc.vllm.recorded_answers import ReceiptMiddleware, Responses
from assay.poc.vllm.recorder import ACCEPTED, AcceptedRequest, Choice, Collector, Recorder
from assay.poc.vllm.response_worker import ARGUMENT, Capture, SeedArgument, read_seed_argument
from tests.poc.service.conftest import FINGERPRINT
from tests.vllm.conftest import lay_out, settings_of_vllm
from tests.wordings import refuses

DIGEST = "0" * 64


def params(**values):
    given = {
        "n": 1,
        "seed": None,
        "extra_args": None,
        "logit_bias": None,
        "max_tokens": 9,
        "detokenize": True,
    }
    given |= {"temperature": 0.7, "top_k": -1, "top_p": 0.9, "min_p": 0.0}
    given |= {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
    return SimpleNamespace(output_kind=SimpleNamespace(name="DELTA"), **given | values)


class Sink:
    """Keeps receipts in a list, or refuses them."""

    def __init__(self) -> None:
        self.receipts = []
        self.error = None

    def check(self, client=None) -> None: ...

    async def store(self, receipt, client=None) -> None:
        if self.error:
            raise self.error
        await asyncio.sleep(0)
        self.receipts.append(receipt)


class LLM:
    """As much of an ``AsyncLLM`` as is wrapped: every choice says its own number, some times
    over.
    """

    errored = False

    def __init__(self, turns: int = 3, pause: float = 0.0, late: float = 0.0) -> None:
        self.output_processor = SimpleNamespace(
            add_request=lambda *given: None, process_outputs=lambda *given: None
        )
        self.turns = turns
        self.pause = pause
        self.late = late
        self.surplus = 0  # tokens behind a stop text, made in its step, which are trimmed
        self.sent = []
        self.calls = []
        self.reply = None

    async def generate(self, prompt, sampling_params, request_id, **options) -> AsyncGenerator:
        parent = SimpleNamespace(sampling_params=sampling_params) if sampling_params.n > 1 else None
        for index in range(sampling_params.n):
            request = SimpleNamespace(
                request_id=f"{index}_{request_id}-ab", external_req_id=request_id
            )
            plain = {
                "prompt_embeds": None,
                "mm_features": None,
                "lora_request": None,
                "resumable": False,
            }
            vars(request).update(
                plain | options, sampling_params=sampling_params, prompt_token_ids=prompt
            )
            self.output_processor.add_request(request, None, parent, index, None)
            self.sent.append(request)
        for turn in range(self.turns):
            finish = "stop" if turn == self.turns - 1 else None
            mine = [one for one in self.sent if one.external_req_id == request_id]
            self.output_processor.process_outputs(
                [
                    SimpleNamespace(
                        request_id=one.request_id,
                        new_token_ids=[0] * (1 + self.surplus * (finish is not None)),
                    )
                    for one in mine
                ]
            )
            while self.surplus and finish and not self.calls:
                await asyncio.sleep(0.001)
            await asyncio.sleep(self.pause)
            yield SimpleNamespace(
                outputs=[
                    SimpleNamespace(index=index, token_ids=[index], finish_reason=finish)
                    for index in range(sampling_params.n)
                ]
            )

    async def collective_rpc(self, method, args):
        self.calls.append((method, *args))
        if isinstance(self.reply, Exception):
            raise self.reply
        await asyncio.sleep(self.late)
        made = {
            name: np.arange(*at).repeat(12).astype(np.float16).tobytes()
            for name, at in args[0].items()
        }
        return [made] if self.reply is None else self.reply


def recorded(llm: LLM | None = None, seeded: bool = True) -> tuple[LLM, Sink, Recorder]:
    """Return an engine, where the receipts of its answers go, and what makes them."""
    llm = llm or LLM()
    sink = Sink()
    header = ReceiptHeader(
        public_key="node",
        reference="model",
        digest=DIGEST,
        weights="trained",
        fingerprint=FINGERPRINT,
    )
    return llm, sink, Recorder(llm, sink, header=header, seeded=seeded)


async def ask(
    llm: LLM, accepted: AcceptedRequest | None, prompts=((5, 6),), stop_after: int = 99, **given
) -> int:
    """Ask as a route does for the prompts of one request; return how many outputs came."""
    ACCEPTED.set(accepted)
    options = {
        name: given.pop(name)
        for name in ("lora_request", "prompt_embeds", "mm_features")
        if name in given
    }
    calls = [
        llm.generate(prompt, params(**given), f"cmpl-{i}", **options)
        for i, prompt in enumerate(prompts)
    ]
    count = 0
    for outputs in calls:
        async for _ in outputs:
            count += 1
            if count == stop_after:
                await outputs.aclose()
                return count
    return count


async def test_every_choice_has_its_seed_and_its_receipt():
    llm, sink, recorder = recorded()
    await ask(
        llm, AcceptedRequest("r", "block", None, "client", "f" * 64), ((5, 6), (7,)), n=2, seed=11
    )
    assert [(one.index, one.output, one.finish, one.user_seed) for one in sink.receipts] == [
        (index, (index % 2,) * 3, "stop", "11") for index in range(4)
    ]
    assert sink.receipts[2].prompt == Prompt.of([7])
    assert sink.receipts[0].sampling == Sampling(temperature=0.7, top_p=0.9)
    assert {(one.chosen_by, one.chat_template) for one in sink.receipts} == {("client", "f" * 64)}
    assert len(llm.calls) == 2  # the choices that end together are collected together
    seed = ResponseSeed(
        user_seed="11",
        request_id="r",
        public_key="node",
        digest=DIGEST,
        block_hash="block",
        index=3,
    )
    carried = read_seed_argument(llm.sent[3].sampling_params)
    sketch, tokens = (tuple(seed.words(stream).tolist()) for stream in ("sketch", "tokens"))
    assert carried == SeedArgument(1, sketch, tokens, sink.receipts[3].sampling)
    assert (llm.sent[3].sampling_params.temperature, llm.sent[3].sampling_params.seed) == (
        0.0,
        None,
    )
    assert recorder.counts == {"stored": 4, "unrecorded": 0, "failed": 0}


async def test_the_receipt_is_stored_before_the_last_output_and_without_it_there_is_no_last_output():
    llm, sink, _ = recorded()
    sink.error = StorageError("disk full", wanted="room", do="make room")
    ACCEPTED.set(accepted := AcceptedRequest("r", "block"))
    outputs = llm.generate((5,), params(), "cmpl-0")
    for _ in range(2):
        await anext(outputs)
    with pytest.raises(StorageError):
        await anext(outputs)
    assert accepted.refused is sink.error


@pytest.mark.parametrize(
    ("reply", "words"),
    [([{}, {}], "0 sketches of 3 tokens"), (RuntimeError("engine died"), "engine died")],
)
async def test_a_response_whose_sketches_are_missing_does_not_end(reply, words: str):
    llm, sink, _ = recorded()
    llm.reply = reply
    with pytest.raises(ModelError, match=words):
        await ask(llm, AcceptedRequest("r", "block"))
    assert sink.receipts == []


async def test_a_client_that_leaves_leaves_no_receipt_and_the_workers_forget():
    llm, sink, _ = recorded()
    await ask(llm, AcceptedRequest("r", "block"), stop_after=1)
    await ask(llm, AcceptedRequest("s", "block"))
    assert [one.request_id for one in sink.receipts] == ["s"]
    assert llm.calls == [("assay_sketches", {"0_cmpl-0-ab": [0, 1]}, ["0_cmpl-0-ab"])]


@pytest.mark.parametrize(
    ("turns", "pause", "late", "asked"),
    [
        (70, 0.006, 0.0, [[0, 1], [1, 2], [2, 3]]),
        (33, 0.0, 0.0, None),  # it waits for the sketches of its last steps
        (33, 0.004, 0.05, [[0, 1], [1, 2]]),  # it ends during a call, and waits for the next one
    ],
)
async def test_sketches_are_taken_while_a_response_goes_on_and_all_are_there_when_it_ends(
    turns, pause, late, asked
):
    llm, sink, _ = recorded(LLM(turns, pause, late))
    await ask(llm, AcceptedRequest("r", "block"))
    assert asked in (None, [numbers for _, wanted, _ in llm.calls for numbers in wanted.values()])
    assert sink.receipts[0].sketches[:, 0].tolist() == list(range(3 if turns == 70 else 2))


@pytest.mark.parametrize("surplus", [0, 1])
async def test_tokens_behind_a_stop_text_are_not_of_the_response(surplus: int):
    llm, sink, _ = recorded(LLM(turns=32, late=0.05))
    llm.surplus = surplus
    asking = asyncio.ensure_future(ask(llm, AcceptedRequest("r", "block")))
    while not llm.calls:
        await asyncio.sleep(0.001)
    if not surplus:  # it comes while the response waits for its sketch
        late = SimpleNamespace(request_id=llm.sent[0].request_id, new_token_ids=[0])
        llm.output_processor.process_outputs([late])
    await asyncio.wait_for(asking, 5)
    assert [one.sketches.shape for one in sink.receipts] == [(1, 12)]


async def test_a_sketch_that_comes_after_its_receipt_refuses_the_answer_of_nobody():
    llm = LLM(late=0.05)
    collector = Collector(llm)
    ended, other = (
        Choice(
            name,
            Receipt(
                user_seed="",
                request_id=name,
                block_hash="block",
                prompt=Prompt.of([5]),
                output=(),
                sketches=np.zeros(0, np.float16),
                sampling=None,
            ),
            output=[0] * length,
        )
        for name, length in (("ended", 32), ("other", 1))
    )
    collector.follow(ended)
    collector.follow(other)
    ended.asked = 1
    ended.found += bytes(24)
    # One token behind its stop text, which the next call asks for.
    surplus = SimpleNamespace(request_id="ended", new_token_ids=[0] * 33)
    llm.output_processor.process_outputs([surplus])
    others_end = asyncio.ensure_future(collector.finish([other]))
    while not llm.calls:
        await asyncio.sleep(0.001)
    await collector.finish([ended])
    receipt = ended.receipt()
    await others_end
    assert (len(receipt.sketches), other.taken) == (1, 1)


def lora_request(path: Path) -> SimpleNamespace:
    return SimpleNamespace(
        lora_name="tuned", lora_path=str(path), lora_int_id=1, load_inplace=False
    )


async def test_the_receipt_of_an_adapter_names_it_by_its_files(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(8))  # of no tensors
    llm, sink, _ = recorded()
    await ask(llm, AcceptedRequest("r", "block"), lora_request=lora_request(tmp_path))
    assert [one.adapter for one in sink.receipts] == [Adapter("tuned", digest_adapter(tmp_path))]
    assert llm.sent[0].sampling_params.temperature == 0


@pytest.mark.parametrize(
    "options",
    [{"lora_request": lora_request(Path("hub/id"))}, {"prompt_embeds": 1}, {"mm_features": [1]}],
)
async def test_requests_that_a_receipt_cannot_name_pass_unseeded(options):
    llm, sink, recorder = recorded()
    assert await ask(llm, AcceptedRequest("r", "block"), seed=3, **options) == 3
    sent = llm.sent[0].sampling_params
    assert (sent.temperature, sent.seed, ARGUMENT in sent.extra_args) == (0.7, 3, False)
    assert (sink.receipts, recorder.counts["unrecorded"]) == ([], 1)


async def test_a_client_cannot_send_what_only_the_plugin_may():
    llm, _, _ = recorded()
    await ask(llm, None, extra_args={ARGUMENT: {"prompt": 1}, "own": 2})
    assert llm.sent[0].sampling_params.extra_args == {"own": 2}
    assert llm.sent[0].sampling_params.temperature == 0.7


async def test_without_a_processor_the_engine_samples_and_the_receipt_says_so():
    llm, sink, _ = recorded(seeded=False)
    await ask(llm, AcceptedRequest("r", "block"), seed=4)
    assert sink.receipts[0].sampling is None
    assert (llm.sent[0].sampling_params.temperature, llm.sent[0].sampling_params.seed) == (0.7, 4)


async def test_masks_are_named():
    llm, sink, _ = recorded()
    for given in ({}, {"bad_words": ["x"]}, {"min_tokens": 2}, {"structured_outputs": object()}):
        await ask(llm, AcceptedRequest("r", "block"), **given)
    assert [one.mask for one in sink.receipts] == [False, True, True, True]


WIDTH = 16


class Runner:
    """A model runner of the V1 kind, whose states name their position."""

    device = "cpu"
    execute_model_state = None
    input_batch = None

    def execute_model(self, scheduler_output): ...

    def sample_tokens(self): ...


CONFIG = settings_of_vllm({"model.get_hidden_size": lambda: WIDTH, "speculative_config": None})


def state_of(name: str, position: int) -> torch.Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(hash(name) % 1000 + position))


def step(runner: Runner, spans: dict[str, tuple[int, int]], new=()):
    """Run positions [computed, computed + length) of requests."""
    lengths = {name: length for name, (_, length) in spans.items()}
    runner.execute_model(SimpleNamespace(scheduled_new_reqs=new, num_scheduled_tokens=lengths))
    rows = [
        state_of(name, at)
        for name, (computed, length) in spans.items()
        for at in range(computed, computed + length)
    ]
    lay_out(runner, torch.stack(rows), spans)
    runner.sample_tokens()


def new_request(name: str, prompt: int, words):
    argument = SeedArgument(prompt, tuple(map(int, words))).as_argument()
    return SimpleNamespace(
        req_id=name, sampling_params=SimpleNamespace(extra_args={ARGUMENT: argument})
    )


def test_the_states_behind_every_32nd_token_are_sketched_through_chunks_and_preemption():
    runner = Runner()
    words = np.arange(8, dtype=np.uint32)
    capture = Capture(runner, CONFIG)
    step(runner, {"x": (0, 4), "a": (0, 6)}, [new_request("a", 10, words)])
    step(runner, {"a": (6, 4), "x": (4, 1)})  # ends the prompt: token 0
    for at in range(10, 30):
        step(runner, {"x": (at, 1), "a": (at, 1)})
    step(
        runner, {"a": (0, 41)}, [new_request("a", 10, words)]
    )  # preempted, and all computed again: token 31 is next
    for at in range(41, 80):
        step(runner, {"a": (at, 1)})
    given = capture.read({"a": range(3), "x": range(3), "unknown": range(1)})
    assert (given["x"], given["unknown"]) == (b"", b"")
    found = np.frombuffer(given["a"], np.float16).reshape(-1, 12)
    states = torch.stack([state_of("a", 9 + token) for token in (0, 32, 64)])
    assert found.tolist() == sketch_states(states, step_seeds(words, [0, 32, 64])).numpy().tolist()
    assert capture.read({"a": range(1, 2)})["a"] == given["a"][24:48]
    assert capture.errors == 0


def test_sketches_behind_one_that_is_missing_are_not_handed_out_and_none_of_requests_that_are_forgotten():
    runner = Runner()
    capture = Capture(runner, CONFIG)
    step(runner, {"a": (0, 2)}, [new_request("a", 2, range(8))])
    step(runner, {"a": (65, 1)})
    assert len(capture.read({"a": range(3)})["a"]) == 24
    capture.drop(["a", "b"])
    assert capture.read({"a": range(1)}) == {"a": b""}
    assert capture.there == {}


def test_with_drafts_the_state_is_found_by_its_position_and_the_last_one_counts():
    """The host's count of positions is a bound there: two tokens too high at first, and right when
    they come again.
    """
    drafting = type("Drafting", (Runner,), {"__module__": "vllm.v1.worker.gpu.model_runner"})
    runner = drafting()
    words = np.arange(8, dtype=np.uint32)
    drafts = {"speculative.num_speculative_tokens": 2}
    capture = Capture(runner, settings_of_vllm({"model_config": CONFIG.model_config} | drafts))
    runner.execute_model(SimpleNamespace(scheduled_new_reqs=[new_request("a", 10, words)]))
    for bound, positions, name in (
        (0, range(10), "a"),
        (42, (40, 41, 42), "wrong"),
        (41, (41, 42, 43), "a"),
    ):
        padded = {
            "req_ids": ["a", "padding"],
            "query_start_loc_np": np.array([0, len(positions), 99]),
        }
        padded["positions"] = torch.tensor(list(positions))
        states = torch.stack([state_of(name, at) for at in positions])
        lay_out(runner, states, {"a": (bound, len(positions))}, prompt=10, **padded)
        runner.sample_tokens()
    found = np.frombuffer(capture.read({"a": range(2)})["a"], np.float16).reshape(-1, 12)
    wanted = sketch_states(
        torch.stack([state_of("a", 9), state_of("a", 41)]), step_seeds(words, [0, 32])
    )
    assert (found.tolist(), capture.errors) == (wanted.numpy().tolist(), 0)


async def test_responses_have_the_newest_block_and_wait_for_the_next():
    beacon = Responses(PluginSettings())
    assert await beacon.next_block(0.01) is None
    beacon.post("a")
    waiting = asyncio.ensure_future(beacon.next_block(5))
    await asyncio.sleep(0)
    beacon.post("a")  # no news
    await asyncio.sleep(0)
    assert not waiting.done()
    beacon.post("b")
    assert (beacon.newest, await waiting) == ("b", "b")


def application(monkeypatch: pytest.MonkeyPatch, **environment: str):
    monkeypatch.setenv("ASSAY_RESPONSES", "seeded")
    monkeypatch.setenv("ASSAY_RESPONSES_PUBLIC_KEY", "node")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    responses, (llm, sink, recorder), app = Responses(PluginSettings()), recorded(), FastAPI()
    responses.recorder = recorder

    @app.post("/v1/chat/completions")
    @app.post("/v1/completions")
    async def complete(body: dict) -> dict:
        outputs = [one async for one in llm.generate((5,), params(seed=body.get("seed")), "cmpl-0")]
        return {"outputs": len(outputs)}

    @app.post("/v1/stream")
    async def stream(body: dict) -> StreamingResponse:
        outputs = llm.generate((5,), params(**body), "cmpl-0")

        async def pieces() -> AsyncGenerator:
            # vLLM tells errors of a stream in one, too.
            with suppress(AssayError):
                async for _ in outputs:
                    yield "data: token\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(pieces(), media_type="text/event-stream")

    app.add_middleware(ReceiptMiddleware, responses=responses)
    client = httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://x"
    )
    return responses, sink, client


async def test_an_answer_names_its_receipt_and_its_block(monkeypatch):
    responses, sink, client = application(monkeypatch)
    first = await client.post("/v1/completions", json={})
    responses.post("0xé")
    # Of two, one of a proxy, vLLM reads the first.
    named = [("X-Request-Id", "mine"), ("X-Request-Id", "proxy"), ("X-Assay-User-Seed", "s")]
    second = await client.post("/v1/completions", json={"seed": 5}, headers=named)
    responses.chat_template = "f" * 64
    third = await client.post("/v1/chat/completions", json={"seed": 5})
    await client.post("/v1/completions", json={})
    assert (first.status_code, first.headers["x-assay-receipt"]) == (200, "none")
    assert (second.headers["x-assay-receipt"], second.headers["x-assay-block"]) == (
        "mine",
        "0x%C3%A9",
    )
    assert [(one.request_id, one.user_seed, one.chosen_by) for one in sink.receipts[:2]] == [
        ("mine", "s", "client"),
        (third.headers["x-assay-receipt"], "5", "server"),
    ]
    assert [one.chat_template for one in sink.receipts] == [None, "f" * 64, None]


@pytest.mark.parametrize("header", ["X-Request-Id", "X-Assay-User-Seed"])
async def test_headers_that_cannot_be_part_of_a_seed_are_refused(monkeypatch, header: str):
    answer = await application(monkeypatch)[2].post(
        "/v1/completions", json={}, headers={header: "x" * 1025}
    )
    assert answer.status_code == 422
    assert header in answer.json()["detail"]


async def test_an_answer_without_a_receipt_is_replaced_by_the_refusal(monkeypatch):
    responses, sink, client = application(monkeypatch)
    responses.post("b")
    sink.error = StorageError("disk full", wanted="room", do="make room")
    answer = await client.post("/v1/completions", json={})
    assert (answer.status_code, answer.json()["detail"]) == (503, "disk full")


@pytest.mark.parametrize(
    ("body", "status", "receipt"),
    [
        ({}, 200, "mine"),
        ({"top_k": 2**31}, 422, None),
        ({"trace_decode_token_ids": [7]}, 200, "none"),
    ],
)
async def test_a_stream_begins_once_its_request_is_recorded_or_refused(
    monkeypatch, body: dict, status: int, receipt: str | None
):
    responses, sink, client = application(monkeypatch)
    responses.post("b")
    answer = await client.post("/v1/stream", json=body, headers={"X-Request-Id": "mine"})
    assert (answer.status_code, answer.headers.get("x-assay-receipt")) == (status, receipt)
    assert len(sink.receipts) == (receipt == "mine")
    assert status == 200 or answer.json().keys() == {"detail", "wanted", "do"}


async def test_a_request_that_waits_for_the_next_block_is_seeded_by_it(monkeypatch):
    responses, sink, client = application(monkeypatch, ASSAY_RESPONSES_BLOCK="next")
    responses.post("old")
    asking = asyncio.ensure_future(client.post("/v1/completions", json={}))
    for _ in range(100):
        await asyncio.sleep(0)
    assert not asking.done()
    responses.post("new")
    assert (await asking).headers["x-assay-block"] == "new"
    assert [one.block_hash for one in sink.receipts] == ["new"]


def config(v2: bool = False, speculative=None, **model):
    values = {
        "use_v2_model_runner": v2,
        "speculative_config": speculative,
        "model_config": SimpleNamespace(**model),
    }
    return SimpleNamespace(**values)


@pytest.mark.parametrize(
    ("given", "mode", "refusal"),
    [
        (config(), "seeded", None),
        (config(v2=True), "seeded", None),
        (config(v2=True), "sketched", None),
        (config(v2=True, speculative=1), "seeded", None),
        (config(speculative=1), "off", None),
        (config(speculative=1), "seeded", "speculative"),
        (config(speculative=1), "sketched", "speculative"),
        (config(logprobs_mode="processed_logprobs"), "seeded", "logprobs-mode"),
        (config(v2=True, return_sampling_mask=True), "seeded", "another sampler"),
    ],
)
def test_engines_that_cannot_record_or_seed_are_refused(given, mode: str, refusal: str | None):
    with pytest.raises(UsageError, match=refusal) if refusal else nullcontext():
        check_responses(given, mode)


def test_the_processor_is_named_behind_those_of_the_operator():
    own = SimpleNamespace(
        worker_extension_cls="assay.poc.vllm.WorkerExtension", logits_processors=["a:B"]
    )
    words = response_arguments(own, config(), "seeded")
    extension = ["--worker-extension-cls", "assay.poc.vllm.ResponseExtension"]
    assert words == [*extension, "--logits-processors", "a:B", "assay.poc.vllm:ProcessorV1"]
    assert response_arguments(own, config(v2=True), "seeded")[-1] == "assay.poc.vllm:ProcessorV2"
    assert "--logits-processors" not in response_arguments(own, config(), "sketched")
    own.worker_extension_cls = "mine.Extension"
    with refuses(UsageError, "the processor is named behind those of the operator"):
        response_arguments(own, config(), "seeded")


def test_responses_need_the_key_of_the_node(monkeypatch):
    monkeypatch.setenv("ASSAY_RESPONSES", "seeded")
    with refuses(UsageError, "responses need the key of the node"):
        PluginSettings()
