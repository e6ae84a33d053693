"""The second reader of docs/responses.md needs Python alone, and gives the test vectors again."""

import base64
import json
import re
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "responses.md").read_text(encoding="utf-8")
VECTORS = json.loads((ROOT / "tests" / "vectors" / "responses.json").read_text(encoding="utf-8"))
READER = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)[0]


@pytest.fixture(scope="module")
def reader():
    names: dict[str, object] = {}
    exec(compile(READER, "docs/responses.md", "exec"), names)
    return SimpleNamespace(**names)


@pytest.mark.parametrize("case", VECTORS["seeds"])
def test_seeds(case, reader):
    assert list(reader.words(case, "tokens")) == case["words"]
    assert list(reader.words(case, "sketch")) == case["sketch_words"]
    assert [reader.step_seed(case["words"], step) for step in case["steps"]] == case["step_seeds"]


@pytest.mark.parametrize("case", VECTORS["noise"])
def test_noise(case, reader):
    assert [reader.gumbel(case["seed"], token) for token in range(8)] == case["gumbels"]


def test_noise_is_that_of_the_streams_everywhere(reader):
    from assay import streams

    wanted = np.asarray(streams.get_backend("numpy", "cpu").gumbels([12345], 2000))[0]
    assert [reader.gumbel(12345, token) for token in range(2000)] == wanted.tolist()


@pytest.mark.parametrize("case", VECTORS["tokens"])
def test_tokens(case, reader):
    found = reader.scores(
        case["logits"], case["sampling"], case["seed"], case["prompt"], case["output"]
    )
    assert [None if value == -np.inf else value for value in found] == case["scores"]
    assert found.index(max(found)) == case["token"]


@pytest.mark.parametrize("case", VECTORS["sketches"])
def test_sketches(case, reader):
    found = reader.sketch(case["state"], VECTORS["seeds"][0]["sketch_words"], case["step"])
    wanted = struct.unpack("<12e", base64.b64decode(case["sketch"]))
    np.testing.assert_allclose(found, wanted, atol=5e-4)


def test_receipts(reader, tmp_path):
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
