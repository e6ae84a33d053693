"""The routes' part of recorded responses, without vLLM: what is answered, and the servers that are refused."""

import asyncio
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI

from assay.errors import StorageError, UsageError
from assay.poc.vllm.preflight import PluginSettings, response_arguments
from assay.poc.vllm.recorder import Beacon
from assay.poc.vllm.response_routes import ReceiptMiddleware, Responses
from assay.poc.vllm.response_settings import check_responses, processor_for
from tests.vllm.recording import LLM, Sink, params, recorded


def test_a_beacon_gives_the_newest_block_and_waits_for_the_next():
    async def scenario():
        beacon = Beacon()
        assert await beacon.next(0.01) is None
        beacon.post("a")
        waiting = asyncio.ensure_future(beacon.next(5))
        await asyncio.sleep(0)
        beacon.post("a")  # no news
        await asyncio.sleep(0)
        assert not waiting.done()
        beacon.post("b")
        return beacon.newest, await waiting

    assert asyncio.run(scenario()) == ("b", "b")


def application(monkeypatch: pytest.MonkeyPatch, **environment: str):
    monkeypatch.setenv("ASSAY_RESPONSES", "seeded")
    monkeypatch.setenv("ASSAY_RESPONSES_PUBLIC_KEY", "node")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    responses, llm, sink, app = Responses(PluginSettings()), LLM(), Sink(), FastAPI()
    responses.sink, responses.recorder = sink, recorded(llm, sink)

    @app.post("/v1/completions")
    async def complete(body: dict) -> dict:
        outputs = [one async for one in llm.generate((5,), params(seed=body.get("seed")), "cmpl-0")]
        return {"outputs": len(outputs)}

    app.add_middleware(ReceiptMiddleware, responses=responses)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://x")
    return responses, sink, client


def test_an_answer_names_its_receipt_and_its_block(monkeypatch):
    async def scenario():
        responses, sink, client = application(monkeypatch)
        first = await client.post("/v1/completions", json={})
        responses.beacon.post("0xé")
        named = {"X-Request-Id": "mine", "X-Assay-User-Seed": "s"}
        second = await client.post("/v1/completions", json={"seed": 5}, headers=named)
        third = await client.post("/v1/completions", json={"seed": 5})
        return first, second, third, sink.receipts

    first, second, third, receipts = asyncio.run(scenario())
    assert (first.status_code, first.headers["x-assay-receipt"]) == (200, "none")
    assert (second.headers["x-assay-receipt"], second.headers["x-assay-block"]) == ("mine", "0x%C3%A9")
    assert [(one.request_id, one.user_seed, one.chosen_by) for one in receipts] == [
        ("mine", "s", "client"),
        (third.headers["x-assay-receipt"], "5", "server"),
    ]


@pytest.mark.parametrize("header", ["X-Request-Id", "X-Assay-User-Seed"])
def test_headers_that_cannot_be_part_of_a_seed_are_refused(monkeypatch, header: str):
    async def scenario():
        _, _, client = application(monkeypatch)
        return await client.post("/v1/completions", json={}, headers={header: "x" * 1025})

    answer = asyncio.run(scenario())
    assert answer.status_code == 422
    assert header in answer.json()["detail"]


def test_an_answer_without_a_receipt_is_replaced_by_the_refusal(monkeypatch):
    async def scenario():
        responses, sink, client = application(monkeypatch)
        responses.beacon.post("b")
        sink.error = StorageError("disk full", wanted="room", do="make room")
        return await client.post("/v1/completions", json={})

    answer = asyncio.run(scenario())
    assert (answer.status_code, answer.json()["detail"]) == (503, "disk full")


def test_a_request_that_waits_for_the_next_block_is_seeded_by_it(monkeypatch):
    async def scenario():
        responses, sink, client = application(monkeypatch, ASSAY_RESPONSES_BLOCK="next")
        responses.beacon.post("old")
        asking = asyncio.ensure_future(client.post("/v1/completions", json={}))
        while not responses.beacon._posted._waiters:
            await asyncio.sleep(0)
        responses.beacon.post("new")
        return (await asking).headers["x-assay-block"], [one.block_hash for one in sink.receipts]

    assert asyncio.run(scenario()) == ("new", ["new"])


def config(v2: bool = False, speculative=None, **model):
    return SimpleNamespace(
        use_v2_model_runner=v2, speculative_config=speculative, model_config=SimpleNamespace(**model)
    )


@pytest.mark.parametrize(
    ("given", "mode", "version", "refusal"),
    [
        (config(speculative=1), "seeded", "0.32.0", "speculative"),
        (config(speculative=1), "sketched", "0.32.0", "speculative"),
        (config(v2=True), "seeded", "0.30.1", "V2 runner has no"),
        (config(logprobs_mode="processed_logprobs"), "seeded", "0.32.0", "logprobs-mode"),
        (config(v2=True, return_sampling_mask=True), "seeded", "0.32.0", "another sampler"),
    ],
)
def test_engines_that_cannot_record_or_seed_are_refused(given, mode, version, refusal):
    with pytest.raises(UsageError, match=refusal):
        check_responses(given, mode, version)
    check_responses(given, "off", version)


def test_engines_that_can_are_taken():
    for v2, version in ((False, "0.28.0"), (True, "0.31.0"), (True, "0.32.1")):
        check_responses(config(v2=v2), "seeded", version)
    check_responses(config(v2=True, speculative=1), "seeded", "0.32.0")
    check_responses(config(v2=True), "sketched", "0.28.0")
    assert processor_for(config(v2=True)).endswith(":ProcessorV2")
    assert processor_for(config()).endswith(":ProcessorV1")


def test_the_processor_is_named_behind_those_of_the_operator():
    own = SimpleNamespace(worker_extension_cls="assay.poc.vllm.WorkerExtension", logits_processors=["a:B"])
    words = response_arguments(own, config(), "seeded")
    assert words == [
        "--worker-extension-cls",
        "assay.poc.vllm.ResponseExtension",
        "--logits-processors",
        "a:B",
        "assay.poc.vllm:ProcessorV1",
    ]
    assert "--logits-processors" not in response_arguments(own, config(), "sketched")
    own.worker_extension_cls = "mine.Extension"
    with pytest.raises(UsageError, match=r"mine\.Extension"):
        response_arguments(own, config(), "seeded")


def test_responses_need_the_key_of_the_node(monkeypatch):
    monkeypatch.setenv("ASSAY_RESPONSES", "seeded")
    with pytest.raises(UsageError, match="ASSAY_RESPONSES_PUBLIC_KEY"):
        PluginSettings()


def test_the_package_names_no_entry_point_that_moves_a_server_to_another_runner():
    from importlib.metadata import distribution

    assert "vllm.logits_processors" not in {entry.group for entry in distribution("assay").entry_points}
