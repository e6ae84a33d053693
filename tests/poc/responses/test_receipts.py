"""Files of receipts: a round trip, and every way in which a file can be wrong."""

import base64
import hashlib
import json
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from assay.errors import ProofFormatError, UsageError
from assay.poc.responses import Prompt, Receipts, Sampling
from assay.poc.responses.receipts import LONGEST_LINE, parse_receipt
from tests.poc.lines import edited, put, replaced
from tests.wordings import refuses


def test_receipts_read_back_as_they_were(responses: Receipts, tmp_path: Path):
    path = tmp_path / "receipts.jsonl"
    responses.save(path)
    read = Receipts.load(path)
    assert read.header == responses.header
    assert read.footer == responses.footer
    assert [receipt.line() for receipt in read.receipts] == [
        receipt.line() for receipt in responses.receipts
    ]
    for one, other in zip(read.receipts, responses.receipts, strict=True):
        assert one.sampling == other.sampling
        assert one.prompt.ids == other.prompt.ids
        np.testing.assert_array_equal(one.sketches, other.sketches)
    again = Receipts.parse("memory", path.read_bytes())
    assert again.footer == responses.footer


def test_the_footer_s_hash_and_counts_are_those_of_the_file(lines: list[str], responses: Receipts):
    footer = json.loads(lines[-1])["footer"]
    assert (
        footer["sha256"]
        == hashlib.sha256("".join(f"{line}\n" for line in lines[1:-1]).encode()).hexdigest()
    )
    assert footer["receipts"] == 4
    assert (
        footer["tokens"]
        == sum(len(receipt.output) for receipt in responses.receipts)
        == 40 + 33 + 3 + 5
    )


def test_a_hash_stands_for_a_prompt(lines: list[str], responses: Receipts):
    receipt = responses.receipts[0]
    hashed = receipt.without_prompt()
    assert (
        receipt.prompt.sha256
        == hashlib.sha256(np.array([3, 1, 4, 1, 5], "<u4").tobytes()).hexdigest()
    )
    assert '"prompt":{"sha256":"' in hashed.line()
    assert "3,1,4,1,5" not in hashed.line()
    read = parse_receipt(f"{hashed.line()}\n".encode())
    assert read.prompt.ids is None
    assert read.prompt == receipt.prompt == Prompt.of([3, 1, 4, 1, 5])
    assert read.prompt != Prompt.of([3, 1, 4, 1, 6])
    assert hashed.without_prompt().line() == hashed.line()


def test_receipts_without_sampling_or_without_sketches(responses: Receipts, tmp_path: Path):
    plain = [replace(receipt, sampling=None, mask=True) for receipt in responses.receipts]
    bare = [
        replace(receipt, sketches=np.empty((0, 12), np.float16)) for receipt in responses.receipts
    ]
    aborted = replace(
        responses.receipts[0], output=(), sketches=np.empty((0, 12), np.float16), finish="abort"
    )
    for header, receipts in (
        (responses.header, [*plain[1:], aborted]),
        (replace(responses.header, sketched=False), [*bare[1:], aborted]),
    ):
        Receipts.build(header, receipts, 1.5).save(tmp_path / "made.jsonl", overwrite=True)
        read = Receipts.load(tmp_path / "made.jsonl")
        assert [receipt.line() for receipt in read.receipts] == [
            receipt.line() for receipt in receipts
        ]
        assert read.header.sketched is header.sketched
    with refuses(UsageError, "receipts without sampling or without sketches"):
        Receipts.build(responses.header, bare, 1.5)


def half(bits: int) -> str:
    return base64.b64encode(np.full(12, bits, "<u2").tobytes()).decode()


GOOD = 1
LAST = 5
BREAKS = {
    "empty file": (lambda lines: [], 1),
    "no header": (lambda lines: lines[1:], 1),
    "sketches with a point": (replaced(0, '"every":32', '"every":32.0'), 1),
    "sketches announced as missing": (edited(0, sketch=None), 2),
    "huge batch": (edited(0, fingerprint__batch_size=10**4000), 1),
    "huge threads": (edited(0, fingerprint__threads=10**4000), 1),
    "empty line": (put(GOOD, ""), 2),
    "an escape": (replaced(GOOD, "plain", "pl\\u0061in"), 2),
    "a lone surrogate": (replaced(GOOD, "plain", "\\ud800"), 2),
    "whole temperature": (replaced(GOOD, '"temperature":1.0', '"temperature":1'), 2),
    "long temperature": (replaced(GOOD, '"temperature":1.0', '"temperature":1.00'), 2),
    "negative zero": (replaced(GOOD, '"min_p":0.0', '"min_p":-0.0'), 2),
    "temperature of 4000 digits": (
        replaced(GOOD, '"temperature":1.0', f'"temperature":1{"0" * 4000}'),
        2,
    ),
    "temperature of 5000 digits": (
        replaced(GOOD, '"temperature":1.0', f'"temperature":1{"0" * 5000}'),
        2,
    ),
    "index with a point": (replaced(GOOD, '"index":0', '"index":0.0'), 2),
    "huge index": (edited(GOOD, index=10**400), 2),
    "huge token": (edited(GOOD, output=[10**400] * 40), 2),
    "sketch of NaN": (edited(GOOD, sketches=[half(0x7E00)] * 2), 2),
    "sketch of infinity": (edited(GOOD, sketches=[half(0xFC00)] * 2), 2),
    "bias of another script's digit": (edited(GOOD, sampling__logit_bias={"٣": 1.0}), 2),
    "biases out of order": (edited(GOOD, sampling__logit_bias={"9": 1.0, "8": 1.0}), 2),
    "fewer tokens than sketches": (edited(GOOD, output=[1] * 32), 2),
    "more tokens than sketches": (edited(GOOD, output=[1] * 65), 2),
    "one sketch too few": (edited(GOOD, sketches=[half(0x3C00)]), 2),
    "token edited": (lambda lines: edited(GOOD, output=[0] * 40)(lines), 6),
    "receipt left out": (lambda lines: [*lines[:2], *lines[3:]], 5),
    "receipts swapped": (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], 6),
    "receipt doubled": (lambda lines: [*lines[:2], lines[1], *lines[2:]], 3),
    "truncated": (lambda lines: lines[:3], 4),
    "no footer": (lambda lines: lines[:-1], 6),
    "line after the end": (lambda lines: [*lines, lines[1]], 7),
    "second footer": (lambda lines: [*lines, lines[-1]], 7),
    "footer counts": (edited(LAST, footer__receipts=3), 6),
    "footer tokens": (edited(LAST, footer__tokens=3), 6),
    "footer hash": (edited(LAST, footer__sha256="0" * 64), 6),
    "footer seconds": (edited(LAST, footer__seconds=-1), 6),
    "footer of a list": (put(LAST, '{"footer":[]}'), 6),
    "footer of truths": (edited(LAST, footer__receipts=True), 6),
    "nested bomb": (put(GOOD, '{"output":' + "[" * 100_000), 2),
    "nested bomb below the count": (put(GOOD, '{"output":' + "[" * 8000), 2),
    "bomb of objects": (put(GOOD, '{"a":' * 8000), 2),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_file_is_refused_with_its_line(name: str, lines: list[str], tmp_path: Path):
    change, line = BREAKS[name]
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(text + "\n" for text in change(lines)), encoding="utf-8", newline="")
    with pytest.raises(ProofFormatError, match=f"line {line}:") as caught:
        Receipts.load(bad)
    error = caught.value
    assert error.wanted
    assert error.do
    assert len(str(error)) < 1500


@pytest.mark.parametrize("levels", range(900, 1000, 2))
def test_what_is_nested_too_deeply_to_be_shown_is_refused(levels: int, lines: list[str]):
    """Python parses a few levels more than it shows in an error that is made further down."""
    before, after = lines[GOOD].split('"user_seed":""')
    text = f'{before}"user_seed":{"[" * levels}{"]" * levels}{after}'
    with refuses(ProofFormatError, "what is nested too deeply to be shown is refused"):
        Receipts.parse("bad", f"{lines[0]}\n{text}\n".encode())


@pytest.mark.parametrize("fill", [b"[],", b"{},", b"0,", b'"a",', b"0.5,", b"[[[[", b'{"a":'])
def test_hostile_lines_take_little_memory(fill: bytes):
    """Values of JSON take up to 40 times the room of their text, so a line is refused before they
    are made.
    """
    line = b'{"output":[' + fill * (2**24 // len(fill)) + b"0]}\n"
    tracemalloc.start()
    with pytest.raises(ProofFormatError):
        parse_receipt(line)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2**20


def test_a_line_of_far_more_keys_than_a_receipt_has_is_not_parsed(lines: list[str]):
    with pytest.raises(ProofFormatError) as caught:
        parse_receipt(lines[GOOD].replace("{", "{" + '"":0,' * 2**15, 1).encode() + b"\n")
    assert "colons" in caught.value.seen


def test_a_line_that_is_too_long_is_not_parsed():
    with refuses(ProofFormatError, "a line that is too long is not parsed"):
        parse_receipt(b" " * (LONGEST_LINE + 1))


@pytest.mark.slow
def test_the_largest_receipt_fits_its_bounds(responses: Receipts):
    ids = tuple(range(2**20))
    largest = replace(
        responses.receipts[0],
        prompt=Prompt.of(ids),
        output=ids,
        sketches=np.zeros((2**15, 12), np.float16),
        request_id=",[{" * 341,
        user_seed=",[{" * 341,
        block_hash=",[{" * 341,
        sampling=Sampling(logit_bias=dict.fromkeys(range(2**24 - 1024, 2**24), 0.1)),
    )
    assert parse_receipt(f"{largest.line()}\n".encode()).prompt == largest.prompt
    with refuses(UsageError, "the largest receipt fits its bounds"):
        replace(largest, output=(*ids, 1))


@pytest.mark.parametrize(
    "values",
    [
        {"sketches": np.zeros((2, 11), np.float16)},
        {"sketches": np.zeros((3, 12), np.float16)},
        {"sketches": np.full((2, 12), np.nan, np.float16)},
        {"output": (1.5,) * 40},
        {"finish": "eos"},
        {"chosen_by": None},
        {"mask": None},
        {"request_id": "\n"},
    ],
)
def test_a_receipt_that_could_not_be_read_cannot_be_made(values: dict, responses: Receipts):
    with pytest.raises(UsageError):
        replace(responses.receipts[0], **values)


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Change, cut, double or insert a few bytes."""
    pieces = [*b'[ ] { } , " : - 0 9e9 null true \\u0000 \xff'.split(b" "), b"\n"]
    for _ in range(draw.randint(1, 3)):
        at, end = sorted(draw.choices(range(len(content) + 1), k=2))
        end = min(end, at + draw.choice((0, 1, 1, 2, 40)))
        content = content[:at] + draw.choice([b"", content[at:end] * 2, *pieces]) + content[end:]
    return content


@pytest.mark.slow
def test_random_edits_are_read_as_they_are_or_refused():
    good = (Path(__file__).parents[2] / "vectors" / "responses.jsonl").read_bytes()
    lines = good.splitlines()[1:-1]
    draw = random.Random(7)
    for _ in range(4000):
        content = mutated(good, draw)
        try:
            read = Receipts.parse("edited", content)
        except ProofFormatError:
            continue
        written = [
            read.header.line(),
            *(receipt.line() for receipt in read.receipts),
            read.footer.line(),
        ]
        assert "".join(f"{line}\n" for line in written).encode() == content
        assert (
            content.splitlines()[1:-1] == lines
        )  # the edit is in the header, such as another key, or in the seconds
