"""Seeded responses of a real server: the tokens of transformers, whatever a client asks for and
sends beside it.
"""

import asyncio
import base64
import io
import json

import httpx
import pytest
import torch
from _vllm import (
    BLOCK,
    MODEL,
    NODE,
    SEEDED,
    ForkedServer,
    agreement,
    begin,
    chat_once,
    mixed,
    receipts_of,
    send_all,
)
from vllm_receipts_soak import kill_loop

from assay.poc.responses import Request, Sampling, respond
from assay.poc.responses.prefill import read_on
from tests.vllm.conftest import SMALL

SENTENCE = "class Node:\n    def __init__(self, "
BODY = {
    "model": MODEL,
    "prompt": SENTENCE,
    "max_tokens": 40,
    "temperature": 0.9,
    "top_p": 0.95,
    "seed": 5,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    # Prompts are cut into chunks, beside one another and beside nonces.
    options = SMALL | {"--max-num-batched-tokens": "96"}
    options |= {"--tool-call-parser": "hermes", "--enable-auto-tool-choice": None}
    with ForkedServer(
        tmp_path_factory.mktemp("server"), environment=SEEDED, options=options
    ) as running:
        answer = running.client.post(
            "/v1/completions", json={"model": MODEL, "prompt": "x", "max_tokens": 1}
        )
        assert (answer.status_code, answer.headers["x-assay-receipt"]) == (
            200,
            "none",
        )  # there is no block yet
        begin(running)
        yield running


@pytest.fixture(scope="module")
def texts(server) -> dict:
    """The texts and receipts of one prompt with three choices, which the tests below ask for in
    other ways.
    """
    return ask(server, "plain", n=3)


def ask(server, request_id: str, **other) -> dict:
    answer = server.client.post(
        "/v1/completions", json=BODY | other, headers={"X-Request-Id": request_id}
    )
    assert answer.status_code == 200, answer.text
    return answer.json() | {"receipts": receipts_of(server, answer.headers["x-assay-receipt"])}


def test_the_tokens_are_those_of_transformers_again_from_the_cache_and_beside_nonces(
    server, honest
):
    requests = mixed(40, honest.tokenizer)
    figures = agreement(server, honest, requests)
    assert (figures["same_tokens"], figures["different"]) == (40, [])
    assert figures["largest_difference_of_sketches"] <= 2e-3
    server.begin("beside")
    again = asyncio.run(send_all(server.url, requests, at_once=3))
    server.post("/stop").raise_for_status()
    assert {one["status"] for one in again} == {200}
    outputs = [
        {receipt.output for receipt in receipts_of(server, request.request_id)}
        for request in requests
    ]
    assert [len(found) for found in outputs] == [1] * 40


def test_choices_have_their_own_noise_and_a_stream_has_the_same(server, honest, texts):
    one = {
        "request_id": "plain",
        "user_seed": "5",
        "sampling": Sampling(temperature=0.9, top_p=0.95),
        "max_tokens": 40,
    }
    prompt = tuple(honest.tokenizer.encode(SENTENCE))
    wanted = respond(
        honest,
        [Request(prompt=prompt, index=i, **one) for i in range(3)],
        block_hash=BLOCK,
        public_key=NODE,
    )
    assert [receipt.output for receipt in texts["receipts"]] == [
        receipt.output for receipt in wanted.receipts
    ]
    assert len({receipt.output for receipt in wanted.receipts}) == 3
    parts = ["", "", ""]
    body = BODY | {"n": 3, "stream": True}
    named = {"X-Request-Id": "plain"}
    with server.client.stream("POST", "/v1/completions", json=body, headers=named) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                parts[choice["index"]] += choice["text"]
    assert parts == [choice["text"] for choice in texts["choices"]]
    assert {receipt.output for receipt in receipts_of(server, "plain")} == {
        one.output for one in wanted.receipts
    }


def test_prompts_of_one_request_are_numbered_through_as_in_the_answer(server):
    both = ask(server, "two-prompts", prompt=[SENTENCE, "x = "], n=2, max_tokens=8)
    assert [receipt.index for receipt in both["receipts"]] == [0, 1, 2, 3]
    assert len({receipt.prompt for receipt in both["receipts"]}) == 2


def test_a_stop_string_ends_text_and_receipt(server, texts):
    whole = texts["receipts"][0]
    stopped = ask(server, "plain", stop=["\n"])
    assert stopped["choices"][0]["text"] == texts["choices"][0]["text"].partition("\n")[0]
    shorter = next(
        one for one in receipts_of(server, "plain") if one.index == 0 and one.finish == "stop"
    )
    assert len(shorter.output) < 40
    assert whole.output[: len(shorter.output)] == shorter.output


def test_log_probabilities_are_those_of_the_model(server, honest):
    answer = ask(server, "logprobs", logprobs=4, max_tokens=6, return_token_ids=True)
    given = answer["choices"][0]["logprobs"]
    receipt = answer["receipts"][0]
    ids = (*honest.tokenizer.encode(SENTENCE), *receipt.output)
    logits, *_ = read_on(honest, list(ids), last=len(receipt.output) + 1)
    wanted = torch.as_tensor(logits).float().log_softmax(-1)[:-1]
    own = [float(row[token]) for row, token in zip(wanted, receipt.output, strict=True)]
    assert given["token_logprobs"] == pytest.approx(own, abs=1e-4)
    assert [max(top.values()) for top in given["top_logprobs"]] == pytest.approx(
        wanted.amax(-1).tolist(), abs=1e-4
    )


def test_requests_that_are_not_seeded_are_left_alone_beside_those_that_are(server, honest):
    """Embeddings have no ids, so that no receipt can name them: greedy requests keep their
    tokens.
    """
    buffer = io.BytesIO()
    ids = torch.tensor(honest.tokenizer.encode(SENTENCE))
    torch.save(honest.module.get_input_embeddings()(ids).detach(), buffer)
    plain = {"model": MODEL, "max_tokens": 24, "temperature": 0.0, "presence_penalty": 0.5}
    plain["prompt_embeds"] = base64.b64encode(buffer.getvalue()).decode()

    async def scenario() -> tuple[str, str]:
        async with httpx.AsyncClient(base_url=server.url, timeout=240.0) as client:
            alone = await client.post("/v1/completions", json=plain)
            assert alone.headers["x-assay-receipt"] == "none"
            load = asyncio.ensure_future(
                send_all(server.url, mixed(12, honest.tokenizer, seed=2, tokens=(40, 60)))
            )
            await asyncio.sleep(0.2)
            beside = await client.post("/v1/completions", json=plain)
            await load
            return alone.json()["choices"][0]["text"], beside.json()["choices"][0]["text"]

    alone, beside = asyncio.run(scenario())
    assert alone == beside != ""
    assert server.get("/responses").json()["receipts"]["unrecorded"] == 2


def test_a_client_that_leaves_has_no_receipt_and_every_other_has(server):
    async def leave() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60.0) as client:
            task = asyncio.ensure_future(chat_once(client, 0, tokens=400))
            await asyncio.sleep(0.3)
            task.cancel()

    before = server.get("/responses").json()["receipts"]
    asyncio.run(leave())
    after = server.get("/responses").json()["receipts"]
    assert after == before
    assert all(worker["errors"] == 0 for worker in server.idle_counts()["workers"])


def test_the_routes_need_keys_and_a_block_that_can_be_a_seed(server):
    with httpx.Client(base_url=server.url) as stranger:
        assert stranger.get("/api/v1/pow/responses").status_code == 401
        assert (
            stranger.post("/api/v1/pow/responses/block", json={"block_hash": "mine"}).status_code
            == 401
        )
    assert server.post("/responses/block", {"block_hash": "\n"}).status_code == 422
    assert server.get("/responses").json()["block_hash"] == BLOCK


def test_no_receipt_of_a_whole_response_is_lost_by_sigkill(server, honest):
    """Last, because the server that starts again knows no block."""
    figures = kill_loop(server, mixed(24, honest.tokenizer, seed=7), kills=1, at_once=6)
    assert figures["choices_without_receipt"] == 0
    assert (figures["responses"], figures["kills"]) == (24, 1)
    assert figures["choices"] == 24 + 2 * 8
    assert figures["interrupted"] > 0
