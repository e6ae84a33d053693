"""The hardened preset: its formula, its seed texts, and a whole round with it."""

from dataclasses import replace

import pytest
import torch

from assay.errors import BadWeights
from assay.models import load_model
from assay.models.decoder import decoder_layers
from assay.poc import PIPELINES, Round, prove

HARDENED = PIPELINES["hardened"]


@pytest.fixture(scope="module")
def hardened() -> Round:
    return Round(block_hash="block_alpha", public_key="node_A", seq_len=16, model="small", preset="hardened")


def test_the_header_of_an_older_preset_says_nothing_new():
    fields = {"name", "summary", "read", "layers", "hidden", "head", "logits", "output"}
    assert set(PIPELINES["artifact"].as_dict()) == fields
    assert HARDENED.as_dict() | {"read": {"count": 0}, "texts": "versioned"} == HARDENED.as_dict()
    assert HARDENED.noise != PIPELINES["artifact"].noise == "vector"


def test_an_overflow_of_float16_is_refused_in_words(small_checkpoint, hardened: Round, tmp_path):
    """Finite weights whose products are not: float16 ends at 65504."""
    for dtype in ("float32", "float16"):
        model = load_model(small_checkpoint, dtype=dtype, device="cpu")
        with torch.no_grad():
            weight = decoder_layers(model.module)[0].mlp.down_proj.weight
            weight.mul_(4e4 / weight.abs().max())
        if dtype == "float32":
            prove(model, hardened, range(8), batch_size=8)
            continue
        with pytest.raises(BadWeights, match="NaN or infinity in float16") as caught:
            prove(model, hardened, range(8), output=tmp_path / "proof.jsonl", batch_size=8)
        assert "--dtype float32" in str(caught.value)
        assert not (tmp_path / "proof.jsonl").exists()


def test_texts_are_versioned_and_prefixed(hardened: Round):
    assert hardened.strength == 256
    assert hardened.text("inputs", 7) == "11:assay.poc/26:inputs11:block_alpha6:node_A1:71:01:0"
    assert hardened.block_text("target") == "11:assay.poc/26:target11:block_alpha1:0"
    plain = [Round(block_hash=b, public_key=k) for b, k in (("a_b", "c"), ("a", "b_c"))]
    assert plain[0].text("inputs", 0) == plain[1].text("inputs", 0), "the published texts collide"
    one, two = (replace(round, preset="hardened").text("inputs", 0) for round in plain)
    assert one != two
