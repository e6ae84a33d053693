"""Stop texts: found while an answer grows exactly where they are found in the whole of it."""

import random
from collections.abc import Sequence
from contextlib import nullcontext
from os.path import commonprefix
from types import SimpleNamespace
from typing import Any

import pytest

from assay.errors import ProofMismatch
from assay.poc.responses import Request
from assay.poc.responses.replaying import check_ends
from assay.poc.responses.stop_search import StopSearch
from tests.models.tokenizer_families import CODE, FAMILIES, WORDS, family
from tests.usual import usual
from tests.wordings import refuses


def answer_text(tokenizer: Any, prompt: Sequence[int], output: Sequence[int], skip: bool) -> str:
    """Return the text of an answer by its definition: what the whole has after the prompt."""
    before, text = (
        tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        for ids in (prompt, [*prompt, *output])
    )
    return text[len(commonprefix([before, text])) :]  # noqa: RUF071 - of texts


def first_end(tokenizer: Any, request: Request, output: Sequence[int]) -> int | None:
    """Return how many tokens there are when a stop is first in the text of them all."""
    for count in range(1, len(output) + 1):
        texts = [
            answer_text(tokenizer, request.ids, output[:count], skip) for skip in (False, True)
        ]
        if any(stop in text for stop in request.stop for text in texts):
            return count
    return None


def first_end_grown(tokenizer: Any, request: Request, output: Sequence[int]) -> int | None:
    search = StopSearch(request.stop, request.ids, tokenizer)
    return next((count for count, token in enumerate(output, 1) if search.add(token)), None)


def drawn_tokens(tokenizer: Any, draw: random.Random) -> list[int]:
    """Return tokens of texts, of single bytes, of specials and of nothing in particular."""
    letters = [*CODE, *WORDS, "漢", "é", "🛑"]
    tokens: list[int] = []
    for _ in range(draw.randint(1, 4)):
        kind = draw.randrange(4)
        if kind == 0:
            tokens += [draw.randrange(len(tokenizer)) for _ in range(draw.randint(1, 6))]
        elif kind == 1:
            tokens.append(draw.choice(tokenizer.all_special_ids))
        else:
            text = "".join(draw.choices(letters, k=draw.randint(1, 12)))
            encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens += encoded[draw.randrange(3) if kind == 2 else 0 :]
    return tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stop_is_found_in_a_growing_answer_where_it_is_found_in_the_whole(name: str):
    tokenizer = family(name)
    draw = random.Random(name)
    ends = 0
    for _ in range(80):
        prompt = drawn_tokens(tokenizer, draw) or [0]
        output = drawn_tokens(tokenizer, draw) or [0]
        text = answer_text(tokenizer, prompt, output, draw.random() < 0.5) or "a"
        starts = [draw.randrange(len(text)) for _ in range(draw.randint(1, 3))]
        stops = [text[start : start + draw.randint(1, 8)] for start in starts]
        # A stop that begins another, one that is nowhere, and a space that a decoder may drop.
        stops += draw.sample([stops[0] + "a", "nowhere", " " + stops[0]], k=1)
        request = Request(prompt=tuple(prompt), request_id="r", stop=tuple(stops))
        end = first_end(tokenizer, request, output)
        assert first_end_grown(tokenizer, request, output) == end, (prompt, output, stops)
        assert request.is_ended(output, (), tokenizer) == (end is not None)
        ends += end is not None
    assert ends > 30


def test_an_answer_ran_past_its_end_where_every_server_would_have_stopped():
    """vLLM looks for stop texts without special tokens unless a client asks for them."""
    tokenizer = family("sentencepiece with a prefix and bytes")
    special = tokenizer.all_special_tokens[0]
    letters = tokenizer("a" * 40, add_special_tokens=False)["input_ids"]
    output = (tokenizer.convert_tokens_to_ids(special), *letters * 20)
    model = SimpleNamespace(tokenizer=tokenizer, end_tokens=frozenset(), reference="m")
    for stop, goes_on in ((special, True), ("a", False)):
        request = Request(prompt=(letters[0],), request_id="r", stop=(stop,))
        receipt = SimpleNamespace(name=request.name, request_id="r", output=output, finish="length")
        receipts = SimpleNamespace(receipts=[receipt])
        refused = refuses(
            ProofMismatch, "an answer ran past its end where every server would have stopped"
        )
        with nullcontext() if goes_on else refused:
            check_ends(receipts, model, [request])


@pytest.mark.parametrize("letter", usual(["漢", "é", "🛑", "e\u0301", "\U00020000"], "漢", "🛑"))
@pytest.mark.parametrize("stop", ["。", "ß", "👩🏽\u200d💻", "e\u0301 ", "。\n", "STOP"])
def test_a_stop_after_a_run_of_bytes_is_found(letter: str, stop: str):
    tokenizer = family("sentencepiece with a prefix and bytes")
    prompt = tuple(tokenizer("x = 1", add_special_tokens=False)["input_ids"])
    request = Request(prompt=prompt, request_id="r", stop=(stop,))
    for count in (1, 2, 9, 10, 11, 17):
        run = letter * count + stop
        encoded = tokenizer(run + " and more", add_special_tokens=False)["input_ids"]
        end = first_end_grown(tokenizer, request, encoded)
        assert end is not None
        assert end == first_end(tokenizer, request, encoded)
        assert not request.is_ended(encoded[: end - 1], (), tokenizer)


def long_tokens(tokenizer: Any, draw: random.Random) -> list[int]:
    """Return stretches of one kind: letters, bytes that are text or none, specials, anything."""
    byte = [tokenizer.convert_tokens_to_ids(f"<0x{value:02X}>") for value in range(256)]
    has_bytes = byte[0] not in (None, tokenizer.unk_token_id)
    tokens: list[int] = []
    for _ in range(draw.randint(1, 5)):
        count = draw.choice([1, 2, 5, 20, 60])
        kind = draw.randrange(6)
        if kind == 0 and has_bytes:
            values = [0xFF, 0x80, 0xE6, 0xBC, 0xF0, 0xEF, 0xBF, 0xBD, 0x41]
            tokens += [byte[draw.choice(values)] for _ in range(count)]
        elif kind == 1 and has_bytes:
            tokens.append(byte[draw.choice([0xFF, 0x80, 0xE6, 0xF0])])
        elif kind == 2:
            tokens += [draw.choice(tokenizer.all_special_ids)] * count
        elif kind == 3:
            tokens += [draw.randrange(len(tokenizer)) for _ in range(count)]
        else:
            letters = draw.choice(["漢", "é", "🛑", "ab ", "x\n", "\ufffd", CODE, *WORDS])
            tokens += tokenizer(letters * count, add_special_tokens=False)["input_ids"][: 4 * count]
    return tokens or [0]


@pytest.mark.parametrize("name", FAMILIES)
def test_stops_of_replacement_characters_are_found_in_long_answers_as_in_the_whole(name: str):
    tokenizer = family(name)
    draw = random.Random(name)
    for _ in range(30):
        prompt = long_tokens(tokenizer, draw)
        output = long_tokens(tokenizer, draw)[:200]
        end = draw.randint(1, len(output))
        text = answer_text(tokenizer, prompt, output[:end], draw.random() < 0.5) or "a"
        start = max(0, len(text) - draw.choice([1, 2, 3, 8, 30]))
        stops = [text[start : start + draw.randint(1, draw.choice([2, 6, 20]))]]
        stops.append(
            draw.choice(["nowhere", "a\ufffd", "\ufffd" * draw.choice([2, 40]), "漢\ufffd"])
        )
        request = Request(prompt=tuple(prompt), request_id="r", stop=tuple(stops))
        grown = first_end_grown(tokenizer, request, output)
        assert grown == first_end(tokenizer, request, output), (prompt, output, stops)


def test_a_long_answer_is_decoded_in_linear_time():
    """Tokens decoded at a token stay few: of bytes that are text or none, of a long prompt, of
    special tokens, of plain text, of rows of the head that are no token; and of a stop that any byte may make.
    """
    tokenizer = family("sentencepiece with a prefix and bytes")
    decoded: list[int] = []

    class Counting:
        def __len__(self) -> int:
            return len(tokenizer)

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def decode(self, ids: list[int], **how: Any) -> str:
            decoded.append(len(ids))
            return tokenizer.decode(ids, **how)

    ids = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("漢", CODE)}
    broken = tokenizer.convert_tokens_to_ids(["<0xFF>", "<0xE6>"])
    for output in (
        ids["漢"] * 400,
        ids[CODE] * 20,
        broken[:1] * 1200,
        broken[1:] * 1200,
        [*broken, *ids["漢"] * 400],
        [tokenizer.eos_token_id] * 1200,
        [len(tokenizer) + 7] * 1200,
    ):
        prompt = tuple(ids[CODE] * 20)
        for stops in (("nowhere", "。"), ("nowhere", "\ufffd\ufffda")):
            request = Request(prompt=prompt, request_id="r", stop=stops)
            decoded.clear()
            assert not request.is_ended(output, (), Counting())
            assert sum(decoded) < 250 * len(output) + 20 * len(prompt)
