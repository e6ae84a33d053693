"""Stop texts: found while an answer grows exactly where they are found in the whole of it."""

import random
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

import pytest

from assay.poc.responses import Request
from tests.models.tokenizer_families import CODE, FAMILIES, WORDS, family


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
    counts = range(1, len(output) + 1)
    return next(
        (n for n in counts if request.is_ended(output[:n], (), tokenizer, grows=True)), None
    )


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


@pytest.mark.parametrize("letter", ["漢", "é", "🛑", "e\u0301", "\U00020000"])
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


def test_a_long_answer_is_decoded_in_linear_time():
    """Tokens decoded at a token stay few: of a run of bytes, of a long prompt, of plain text."""
    tokenizer = family("sentencepiece with a prefix and bytes")
    decoded: list[int] = []

    class Counting:
        def decode(self, ids: list[int], **how: Any) -> str:
            decoded.append(len(ids))
            return tokenizer.decode(ids, **how)

    for text in ("漢" * 400, CODE * 10, "🛑é" * 200):
        prompt = tuple(tokenizer(CODE * 20)["input_ids"])
        output = tokenizer(text, add_special_tokens=False)["input_ids"]
        request = Request(prompt=prompt, request_id="r", stop=("nowhere", "。"))
        decoded.clear()
        assert not request.is_ended(output, (), Counting())
        assert sum(decoded) < 60 * len(output) + 20 * len(prompt)
