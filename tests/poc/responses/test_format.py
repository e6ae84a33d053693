"""The JSON schema and the test vectors are those of the code."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from assay.errors import ProofFormatError
from assay.files.jsonl import dumps
from assay.poc import responses
from assay.poc.responses import Receipts
from assay.poc.responses.receipts import MOST_TOKENS, parse_header, parse_receipt
from assay.poc.responses.sampling import HIGHEST_INDEX, HIGHEST_TOKEN, RANGES
from tests.poc.responses.vectors import FOLDER, receipts, vectors

SCHEMA = json.loads(
    (Path(responses.__file__).parent / "receipt.schema.json").read_text(encoding="utf-8")
)
CHECK = jsonschema_rs.Draft202012Validator(SCHEMA)
HEADER, *RECEIPTS, FOOTER = (FOLDER / "responses.jsonl").read_text(encoding="utf-8").splitlines()


def test_the_vectors_are_those_of_the_code():
    assert json.loads((FOLDER / "responses.json").read_text(encoding="utf-8")) == vectors()


def test_the_receipts_are_those_of_the_code(tmp_path: Path):
    receipts().save(tmp_path / "receipts.jsonl")
    assert (tmp_path / "receipts.jsonl").read_bytes() == (FOLDER / "responses.jsonl").read_bytes()
    assert Receipts.load(FOLDER / "responses.jsonl").footer == receipts().footer


def test_every_line_fits_the_schema(lines: list[str]):
    for line in (HEADER, *RECEIPTS, FOOTER, *lines):
        assert CHECK.is_valid(json.loads(line)), line
    bare = replace(receipts().header, sketched=False).line()
    assert CHECK.is_valid(json.loads(bare))


def objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from objects(inner)


def test_the_schema_is_closed():
    described = [value for value in objects(SCHEMA) if "properties" in value]
    assert len(described) == 11
    for value in described:
        assert value["additionalProperties"] is False
        assert value["required"] == [
            name for name in value["properties"] if name not in ("adapter", "chat_template")
        ]


def test_the_schema_has_the_bounds_of_the_code():
    defined = SCHEMA["$defs"]
    for name, bounds in RANGES.items():
        stated = defined["sampling"]["properties"][name]
        stated = stated["oneOf"][1] if name == "temperature" else stated
        assert (stated["minimum"], stated["maximum"]) == bounds
    assert defined["token"]["maximum"] == HIGHEST_TOKEN
    assert defined["receipt"]["properties"]["index"]["maximum"] == HIGHEST_INDEX
    assert defined["receipt"]["properties"]["output"]["maxItems"] == MOST_TOKENS


ODD: list[Any] = [
    None, True, 0, -1, 1.5, 2**60, 10**30, "", "text", "a\nb", "a\u00a0b", "x" * 1025, [], [1], [[]], {}, {"a": 1},
    [-1], [2**24], ["1"], [1.5], ["AAAA"], "0" * 64, "A" * 64, {"ids": []}, {"ids": [1], "tokens": 1}, {"1": 200.0},
    {"01": 1.0}, {"-1": 1.0}, {"16777216": 1.0}, 0.005, 1000.5, 100.5, "client", "stop",
]  # fmt: skip


def variants(line: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a line with another value in the place of each of its values, with one field less and
    with one more.
    """

    def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        for name, inner in value.items() if isinstance(value, dict) else ():
            yield (*path, name)
            yield from places(inner, (*path, name))

    for place in places(json.loads(line)):
        for odd in [*ODD, "missing", "more"]:
            changed = json.loads(line)
            target = changed
            for name in place[:-1]:
                target = target[name]
            if odd == "missing":
                del target[place[-1]]
            elif odd == "more":
                target[f"{place[-1]}_"] = 1
            else:
                target[place[-1]] = odd
            yield f"{'.'.join(place)} = {odd!r:.40}", changed


@pytest.mark.parametrize(
    ("line", "parse"), [(HEADER, parse_header), *((line, parse_receipt) for line in RECEIPTS)]
)
def test_the_schema_refuses_what_the_reader_refuses(line: str, parse):
    """One direction for all; the other but for what a schema cannot say."""
    refused = 0
    for name, changed in variants(line):
        try:
            parse(f"{dumps(changed)}\n".encode())
        except ProofFormatError as error:
            refused += 1
            unsaid = ("in another form", "sketches for")
            if not any(words in error.seen for words in unsaid) and "16777216" not in name:
                assert not CHECK.is_valid(changed), name
        else:
            assert CHECK.is_valid(changed), name
    assert refused > 200
