"""Chat as it is served: messages in, the template's hash in the receipt, and a replay that knows
another template.
"""

from dataclasses import replace

import pytest

from assay.errors import ProofMismatch
from assay.models.chat import chat_template_digest, read_chat
from assay.poc.responses import ReceiptPins, Receipts, read_requests, replay, respond
from assay.poc.responses.receipts import parse_receipt
from assay.poc.responses.requests import encode_requests
from tests.models.test_chat import TEMPLATE, USER, chat_tokenizer
from tests.poc.responses.test_requests import FITS, written
from tests.wordings import refuses


@pytest.fixture(scope="module")
def chat_model(small_model):
    return replace(small_model, tokenizer=chat_tokenizer(TEMPLATE))


@pytest.fixture(scope="module")
def chats(tmp_path_factory, chat_model):
    path = tmp_path_factory.mktemp("chat") / "prompts.jsonl"
    written(
        path,
        *(
            {"messages": USER, "request_id": f"r{t}", "max_tokens": 3, "temperature": t}
            for t in (0, 0.7)
        ),
    )
    return encode_requests(read_requests(path), chat_model.tokenizer, **FITS)


def test_messages_are_answered_and_replayed(chats, chat_model):
    assert chat_model.tokenizer.decode(chats[0].ids) == "<s><user>Hi;<assistant>"
    made = respond(chat_model, chats, block_hash="B", public_key="K")
    ReceiptPins(requests=chats).check(made)
    assert all(one.matches == len(one.receipt.output) for one in replay(made, chat_model))
    digest = chat_template_digest(chat_model.tokenizer)
    assert [parse_receipt(one.line().encode() + b"\n").chat_template for one in made.receipts] == [
        digest
    ] * 2


def test_another_template_is_named(chats, chat_model):
    made = respond(chat_model, chats, block_hash="B", public_key="K")
    for template, match in (
        (f"{TEMPLATE} ", "the chat template [0-9a-f]{12} made"),
        ("", "which has none"),
    ):
        other = replace(chat_model, tokenizer=chat_tokenizer(template))
        with pytest.raises(ProofMismatch, match=match):
            replay(made, other)
    assert len(replay(made, other, requests=chats)) == 2
    with refuses(ProofMismatch, "another template is named"):
        ReceiptPins(requests=[replace(one, chat_template="0" * 64) for one in chats]).check(made)


def test_a_stop_ends_an_answer_and_an_answer_that_was_cut_is_refused(tmp_path, chat_model):
    """Where the client asked for a text or a token at which to stop, and not elsewhere, an answer
    may end there.
    """
    asked = {"prompt": [5, 6], "request_id": "r", "max_tokens": 24}
    bias = {str(letter): 30 for letter in (104, 105, 106)} | {
        "257": 30
    }  # three letters and an end token

    def answered(**given):
        path = written(tmp_path / "prompts.jsonl", asked | {"logit_bias": bias} | given)
        requests = encode_requests(read_requests(path), chat_model.tokenizer, **FITS)
        return requests, respond(
            chat_model, requests, block_hash="B", public_key="K", end_tokens=()
        )

    plain, whole = answered()
    output = whole.receipts[0].output
    text = chat_model.tokenizer.decode(output[3:5])
    place = output.index(257) + 1
    for given in (
        {"stop": text},
        {"stop": ["nowhere", text], "stop_token_ids": None},
        {"stop_token_ids": [output[2]]},
    ):
        requests, made = answered(**given)
        (receipt,) = made.receipts
        assert receipt.finish == "stop"
        assert receipt.output == output[: len(receipt.output)] != output
        assert len(replay(made, chat_model, requests=requests)) == 1
        with pytest.raises(
            ProofMismatch, match=f"ended by stop after {len(receipt.output)} tokens"
        ):
            replay(made, chat_model, requests=plain)
        with refuses(ProofMismatch, "a stop ends an answer and an answer that was cut is refused"):
            replay(whole, chat_model, requests=requests)
    ended = replace(
        whole.receipts[0],
        output=output[:place],
        finish="stop",
        sketches=whole.receipts[0].sketches[:1],
    )
    replay(Receipts.build(whole.header, [ended], 1.0), chat_model, requests=plain)


def test_a_real_chat_model_answers_messages(smollm2):
    (made,) = respond(
        smollm2, [read_chat(USER)], block_hash="B", public_key="K", max_tokens=6
    ).receipts
    assert smollm2.tokenizer.decode(made.prompt.ids).endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert made.chat_template == chat_template_digest(smollm2.tokenizer)
