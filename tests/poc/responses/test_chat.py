"""Chat as it is served: messages in, the template's hash in the receipt, and a replay that knows another template."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from assay.errors import ModelNotFound, ProofMismatch
from assay.models import load_model
from assay.models.chat import chat_template_digest, read_chat
from assay.poc.responses import ReceiptPins, Sampling, read_requests, replay, respond
from assay.poc.responses.receipts import parse_receipt
from assay.poc.responses.requests import encode_requests
from tests.models.test_chat import TEMPLATE, USER, chat_tokenizer
from tests.poc.responses.test_requests import FITS, written

PAGE = Path(__file__).parents[3] / "docs" / "responses.md"


@pytest.fixture(scope="module")
def chat_model(small_model):
    return replace(small_model, tokenizer=chat_tokenizer(TEMPLATE))


@pytest.fixture(scope="module")
def chats(tmp_path_factory, chat_model):
    (line,) = (one for one in re.findall(r"```json\n(.*?)\n```", PAGE.read_text("utf-8")) if "messages" in one)
    path = tmp_path_factory.mktemp("chat") / "prompts.jsonl"
    given = json.loads(line)
    written(path, *(given | {"request_id": f"r{t}", "max_tokens": 3, "temperature": t} for t in (0, 0.7)))
    return encode_requests(read_requests(path), chat_model.tokenizer, **FITS)


def test_messages_are_answered_and_replayed(chats, chat_model):
    assert chat_model.tokenizer.decode(chats[0].ids) == "<s><user>What is 2 + 2?;<assistant>"
    made = respond(chat_model, chats, block_hash="B", public_key="K")
    ReceiptPins(requests=chats).check(made)
    assert all(one.matches == len(one.receipt.output) for one in replay(made, chat_model))
    digest = chat_template_digest(chat_model.tokenizer)
    assert [parse_receipt(one.line().encode() + b"\n").chat_template for one in made.receipts] == [digest] * 2


def test_another_template_is_named(chats, chat_model):
    made = respond(chat_model, chats, block_hash="B", public_key="K")
    for template, match in ((f"{TEMPLATE} ", "the chat template [0-9a-f]{12} made"), ("", "which has none")):
        other = replace(chat_model, tokenizer=chat_tokenizer(template))
        with pytest.raises(ProofMismatch, match=match):
            replay(made, other)
    by_ids = {one.prompt.sha256: one.prompt for one in made.receipts}
    assert len(replay(made, other, prompts=by_ids)) == 2
    with pytest.raises(ProofMismatch, match="with chat_template"):
        ReceiptPins(requests=[replace(one, chat_template="0" * 64) for one in chats]).check(made)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_real_chat_model_answers_messages(temperature: float):
    try:
        model = load_model("pretrained:smollm2", dtype="float32", device="cpu")
    except ModelNotFound as error:
        pytest.skip(f"pretrained:smollm2: {error.seen}")
    how = {"sampling": Sampling(temperature=temperature), "block_hash": "B", "public_key": "K", "max_tokens": 6}
    (found,) = replay(respond(model, [read_chat(USER)], **how), model)
    assert found.matches == len(found.receipt.output)
