"""Files of prompts: what a line may say, and what is refused before a model is loaded."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from assay.errors import DataError, UsageError
from assay.models import load_tokenizer
from assay.poc.responses import Request, Sampling, read_requests
from assay.poc.responses.requests import encode_requests
from assay.poc.responses.stop_search import StopSearch
from tests.poc.responses.test_receipts import mutated

FITS = {"reference": "small", "vocab_size": 512, "max_positions": 128}


def written(path: Path, *lines: object) -> Path:
    path.write_text(
        "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    )
    return path


def test_a_line_sets_what_differs(tmp_path: Path):
    path = written(
        tmp_path / "prompts.jsonl",
        {"prompt": "Hello"},
        {
            "prompt": [1, 2],
            "request_id": "r",
            "user_seed": "u",
            "max_tokens": 3,
            "top_k": 5,
            "logit_bias": {"7": 1},
        },
        {"prompt": [1], "request_id": "many", "n": 3},
    )
    found = read_requests(path, sampling=Sampling(temperature=0.5), user_seed="all", max_tokens=9)
    assert found[0] == Request(
        prompt="Hello", request_id="line-1", chosen_by="server", user_seed="all", sampling=Sampling(temperature=0.5),
        max_tokens=9,
    )  # fmt: skip
    assert found[1] == Request(
        prompt=(1, 2), request_id="r", chosen_by="client", user_seed="u", max_tokens=3,
        sampling=Sampling(temperature=0.5, top_k=5, logit_bias={7: 1.0}),
    )  # fmt: skip
    assert [(request.request_id, request.index) for request in found[2:]] == [
        ("many", 0),
        ("many", 1),
        ("many", 2),
    ]


BREAKS = {
    "nothing": ([], "empty"),
    "no prompt": ([{"request_id": "r"}], "line 1: no prompt"),
    "unknown field": ([{"prompt": "a", "seed": 1}], "line 1: a field 'seed'"),
    "prompt and messages": (
        [{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}],
        "line 1: both prompt",
    ),
    "stop of a number": ([{"prompt": "a", "stop": 7}], "line 1: stop is 7"),
    "stop of numbers": ([{"prompt": "a", "stop": [7]}], r"line 1: stop is \(7,"),
    "empty stop": ([{"prompt": "a", "stop": ["a", ""]}], "line 1: stop is"),
    "too many stops": ([{"prompt": "a", "stop": ["a"] * 65}], "line 1: stop is"),
    "stop token of text": (
        [{"prompt": "a", "stop_token_ids": ["a", 1]}],
        "line 1: a token of stop_token_ids is 'a'",
    ),
    "negative stop token": (
        [{"prompt": "a", "stop_token_ids": [-1]}],
        "line 1: a token of stop_token_ids is -1",
    ),
    "prompt of a number": ([{"prompt": 7}], "line 1: prompt is 7"),
    "empty text": ([{"prompt": ""}], "line 1: a prompt of 0"),
    "no tokens": ([{"prompt": []}], "line 1: the prompt of 0"),
    "token of text": ([{"prompt": [1, "2"]}], "line 1: a token of the prompt is '2'"),
    "negative token": ([{"prompt": [-1]}], "line 1: a token of the prompt is -1"),
    "sampling out of range": ([{"prompt": "a"}, {"prompt": "b", "top_p": 2}], "line 2: top_p is 2"),
    "bias of a list": ([{"prompt": "a", "logit_bias": [1]}], "line 1: logit_bias is"),
    "bias of a word": ([{"prompt": "a", "logit_bias": {"x": 1}}], "line 1: logit_bias is"),
    "no answers": ([{"prompt": "a", "n": 0}], "line 1: n is 0"),
    "too many answers": ([{"prompt": "a", "n": 10**9}], "line 1: n is"),
    "no tokens to make": ([{"prompt": "a", "max_tokens": 0}], "line 1: max_tokens is 0"),
    "id of a number": ([{"prompt": "a", "request_id": 5}], "line 1: request_id is 5"),
    "seed of null": ([{"prompt": "a", "user_seed": None}], "line 1: user_seed is None"),
    "an id twice": (
        [{"prompt": "a", "request_id": "r"}, {"prompt": "b", "request_id": "r"}],
        "of line 1",
    ),
    "an id that another line gets": (
        [{"prompt": "a", "request_id": "line-2"}, {"prompt": "b"}],
        "of line 1",
    ),
    "not JSON": (["{"], "line 1"),
    "not an object": (["[1]"], "line 1"),
    "nested bomb": (["[" * 100_000], "line 1"),
    "NaN": (['{"prompt":"a","temperature":NaN}'], "line 1"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_wrong_line_is_refused(name: str, tmp_path: Path):
    lines, match = BREAKS[name]
    with pytest.raises(DataError, match=match) as caught:
        read_requests(written(tmp_path / "prompts.jsonl", *lines))
    assert caught.value.wanted
    assert caught.value.do


def test_one_id_may_have_several_seeds(tmp_path: Path):
    lines = [{"prompt": "a", "request_id": "r", "user_seed": seed} for seed in ("u", "v")]
    assert len(read_requests(written(tmp_path / "prompts.jsonl", *lines))) == 2


def test_text_is_encoded_by_the_model_s_tokenizer():
    tokenizer = load_tokenizer("reference:qwen3")
    found = encode_requests(
        [Request(prompt="def add(a, b):", request_id="r")], tokenizer, **FITS | {"vocab_size": 4096}
    )
    assert tokenizer.decode(found[0].ids) == "def add(a, b):"


def test_a_growing_answer_ends_where_the_whole_does_and_only_its_tail_is_decoded():
    """A byte-level tokenizer gives a letter of four bytes in four tokens, and the stop begins
    inside of one.
    """
    decoded: list[int] = []

    class Bytes:
        def __len__(self) -> int:
            return 256

        def decode(self, ids, **how) -> str:
            decoded.append(len(ids))
            return bytes(ids).decode(errors="replace")

    text = ("ab\U0001f642c" * 40).encode()
    request = Request(
        prompt=(97,) * 20, request_id="r", stop=("\U0001f642cab\U0001f642", "nowhere")
    )
    ends = [request.is_ended(text[:end], (), Bytes()) for end in range(1, len(text) + 1)]
    decoded.clear()
    search = StopSearch(request.stop, request.ids, Bytes())
    grown = [search.add(token) for token in text]
    assert grown.index(True) == ends.index(True) == 2 + 4 + 1 + 2 + 4 - 1
    assert max(decoded) < 64 < len(text)


def test_what_does_not_fit_the_model_is_refused():
    request = Request(prompt=(1, 2, 511), request_id="r", max_tokens=125)
    assert encode_requests([request], None, **FITS) == [request]
    for other, match in (
        (replace(request, max_tokens=126), "3 tokens and asks for 126"),
        (replace(request, prompt=(1,) * 128), "128 tokens"),
        (replace(request, prompt=(512,)), "token 512"),
        (replace(request, sampling=Sampling(logit_bias={512: 1.0})), "logit_bias of token 512"),
        (replace(request, prompt="text"), "has no tokenizer"),
    ):
        with pytest.raises(UsageError, match=match):
            encode_requests([other], None, **FITS)


def test_random_edits_are_read_or_refused(tmp_path: Path):
    good = b'{"prompt":[1,22,3],"request_id":"r","n":2,"temperature":0.5,"logit_bias":{"7":1.5}}\n{"prompt":"a b"}\n'
    draw = random.Random(3)
    path = tmp_path / "prompts.jsonl"
    refused = 0
    for _ in range(400):
        path.write_bytes(mutated(good, draw))
        try:
            assert all(isinstance(request, Request) for request in read_requests(path))
        except DataError:
            refused += 1
    assert 200 < refused < 400
