"""The second reader of docs/responses.md needs Python alone, and gives the test vectors again."""

import ast
import base64
import json
import re
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "responses.md").read_text(encoding="utf-8")
VECTORS = json.loads((ROOT / "tests" / "vectors" / "responses.json").read_text(encoding="utf-8"))
READER = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)[0]


@pytest.fixture(scope="module")
def reader() -> SimpleNamespace:
    names: dict[str, object] = {}
    exec(compile(READER, "docs/responses.md", "exec"), names)
    return SimpleNamespace(**names)


def test_it_is_short_and_needs_nothing():
    assert sum(bool(line) for line in READER.splitlines()) <= 100  # beside the blank ones between functions
    imported = {
        name.name for node in ast.walk(ast.parse(READER)) if isinstance(node, ast.Import) for name in node.names
    }
    assert imported <= sys.stdlib_module_names
    assert "from" not in READER.split()


@pytest.mark.parametrize("case", VECTORS["seeds"])
def test_seeds(case: dict, reader: SimpleNamespace):
    assert list(reader.words(case, "tokens")) == case["words"]
    assert list(reader.words(case, "sketch")) == case["sketch_words"]
    assert [reader.step_seed(case["words"], step) for step in case["steps"]] == case["step_seeds"]


@pytest.mark.parametrize("case", VECTORS["noise"])
def test_noise(case: dict, reader: SimpleNamespace):
    assert [reader.gumbel(case["seed"], token) for token in range(8)] == case["gumbels"]


def test_noise_is_that_of_the_streams_everywhere(reader: SimpleNamespace):
    from assay import streams

    wanted = np.asarray(streams.get_backend("numpy", "cpu").gumbels([12345], 2000))[0]
    assert [reader.gumbel(12345, token) for token in range(2000)] == wanted.tolist()


@pytest.mark.parametrize("case", VECTORS["tokens"])
def test_tokens(case: dict, reader: SimpleNamespace):
    found = reader.scores(case["logits"], case["sampling"], case["seed"], case["prompt"], case["output"])
    assert [None if value == -np.inf else value for value in found] == case["scores"]
    assert found.index(max(found)) == case["token"]


@pytest.mark.parametrize("case", VECTORS["sketches"])
def test_sketches(case: dict, reader: SimpleNamespace):
    found = reader.sketch(case["state"], VECTORS["seeds"][0]["sketch_words"], case["step"])
    wanted = struct.unpack("<12e", base64.b64decode(case["sketch"]))
    np.testing.assert_allclose(found, wanted, atol=5e-4)


def test_receipts(reader: SimpleNamespace, tmp_path: Path):
    from assay.poc.responses import Receipts

    path = ROOT / "tests" / "vectors" / "responses.jsonl"
    header, found = reader.read(path)
    made = Receipts.load(path)
    assert header["model"]["digest"] == made.header.digest
    for one, other in zip(found, made.receipts, strict=True):
        seed = made.header.seed(other)
        assert list(one["words"]["tokens"]) == seed.words().tolist()
        assert list(one["words"]["sketch"]) == seed.words("sketch").tolist()
        np.testing.assert_array_equal(np.array(one["sketches"]).reshape(-1, 12), other.sketches)
        assert one["prompt"]["sha256"] == other.prompt.sha256
    edited = tmp_path / "edited.jsonl"
    edited.write_bytes(path.read_bytes().replace(b'"output":[7,2]', b'"output":[7,3]'))
    with pytest.raises(AssertionError):
        reader.read(edited)


def test_the_page_states_the_ranges_of_the_code():
    from assay.poc.responses.receipts import LONGEST_LINE, MOST_TOKENS
    from assay.poc.responses.sampling import HIGHEST_TOKEN, RANGES

    assert (LONGEST_LINE, MOST_TOKENS, HIGHEST_TOKEN + 1) == (32 * 2**20, 2**20, 2**24)
    assert "32 MiB" in PAGE
    for name, (low, high) in RANGES.items():
        row = next(
            line for line in PAGE.splitlines() if line.startswith("|") and f"`{name}`" in line and " to " in line
        )
        stated = row.replace("−", "-").replace("10⁻⁶", "1e-06")
        assert f"{low:g} to {high:g}" in stated


def test_bytes_per_token_are_those_of_the_page():
    from dataclasses import replace

    from assay.poc.responses import Receipts, Sampling

    receipt = Receipts.load(ROOT / "tests" / "vectors" / "responses.jsonl").receipts[0]

    def size(tokens: int, vocabulary: int) -> int:
        output = np.linspace(0, vocabulary - 1, tokens).astype(int)
        sketches = np.tile(receipt.sketches[:1], (-(-tokens // 32), 1))
        return len(replace(receipt, output=output, sketches=sketches).line())

    for vocabulary, stated in ((4096, "4.7"), (128256, "6.1")):
        ids = (size(64_000, vocabulary) - size(32_000, vocabulary)) / 32_000 - 35 / 32
        assert f"{ids:.1f}" == stated
        assert stated in PAGE
    assert "1.09 bytes a token" in PAGE
    usual = {"request_id": f"chatcmpl-{'0' * 32}", "block_hash": "0" * 64, "sampling": Sampling(temperature=0.7)}
    assert len(replace(receipt, **usual, output=(), sketches=receipt.sketches[:0]).line()) == pytest.approx(420, abs=10)
