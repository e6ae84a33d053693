"""The hardened preset: its formula, its seed texts, and a whole round with it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from assay.errors import BadWeights, UsageError
from assay.models import load_model
from assay.models.decoder import decoder_layers
from assay.poc import PIPELINES, HFEngine, Round, prove
from assay.poc.engines.hf.engine import make_transform
from assay.poc.protocol.transforms import random_projection
from assay.streams import get_backend, seeds
from tests.wordings import refuses

HARDENED = PIPELINES["hardened"]


@pytest.fixture(scope="module")
def hardened() -> Round:
    return Round(
        block_hash="block_alpha", public_key="node_A", seq_len=16, model="small", preset="hardened"
    )


def test_the_header_of_an_older_preset_says_nothing_new():
    fields = {"name", "summary", "read", "layers", "hidden", "head", "logits", "output"}
    assert set(PIPELINES["artifact"].as_dict()) == fields
    assert (
        HARDENED.as_dict() | {"read": {"count": 0, "scaled": True}, "texts": "versioned"}
        == HARDENED.as_dict()
    )
    assert HARDENED.noise != PIPELINES["artifact"].noise == "vector"


def test_differences_of_scaled_neighbours_are_read(small_model, hardened: Round):
    """The page's formula in float64, on states with a coordinate that is large everywhere."""
    engine = HFEngine(small_model, batch_size=4, seq_len=16)
    states_BTD = torch.randn(4, 16, engine.hidden_size, generator=torch.Generator().manual_seed(0))
    states_BTD[..., 5] += 1000
    reading = make_transform(engine, hardened, HARDENED).reading(hardened.inputs(range(4)), 16)
    signs = get_backend("numpy").signs(seeds(hardened.texts("weights", range(4))), 16)
    for found, h_TD, s in zip(
        reading.sum(states_BTD), states_BTD.double().numpy()[:, 2:], signs, strict=True
    ):
        y_RD = (h_TD - h_TD.mean(axis=0)) / (h_TD.std(axis=0) + 1e-8)
        y_RD /= np.linalg.norm(y_RD, axis=1, keepdims=True) + 1e-8
        wanted = sum(s[i] * (y_RD[2 * i] - y_RD[2 * i + 1]) for i in range(7))
        np.testing.assert_allclose(found.numpy(), wanted, atol=2e-4)
    with refuses(UsageError, "differences of scaled neighbours are read"):
        replace(hardened, seq_len=7)


def test_a_nonce_alone_has_the_bits_that_it_has_beside_others(small_model, hardened: Round):
    """Seen where a first pass of vLLM had one nonce: of one row, torch multiplies by another
    kernel.
    """
    transform = make_transform(HFEngine(small_model, batch_size=4, seq_len=16), hardened, HARDENED)
    x_BD = torch.randn(40, small_model.hidden_size, generator=torch.Generator().manual_seed(0))
    normals_BN = torch.randn(
        40, 32 * small_model.hidden_size, generator=torch.Generator().manual_seed(1)
    )
    alone = [random_projection(x_BD[i : i + 1], normals_BN[i : i + 1], 32) for i in range(40)]
    assert torch.equal(torch.cat(alone), random_projection(x_BD, normals_BN, 32))
    inputs = hardened.inputs(range(40))
    apart = [transform(x_BD[i : i + 1], inputs[i : i + 1]) for i in range(40)]
    assert torch.equal(torch.cat(apart), transform(x_BD, inputs))


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
        with refuses(BadWeights, "an overflow of float16 is refused in words") as caught:
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
