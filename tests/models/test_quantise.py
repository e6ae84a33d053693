"""Weights in eight bits: what is rounded, what is not, and what is refused."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from assay.errors import BackendUnavailable, ModelError
from assay.models import eight_bits, load_model
from assay.models.decoder import backbone
from assay.models.eight_bits import round_rows
from assay.models.number_formats import check_rounding
from assay.poc import HFEngine, Round, prove, verify
from tests.wordings import refuses


def test_float8_needs_a_device_that_has_it(small_checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with refuses(BackendUnavailable, "float8 needs a device that has it"):
        check_rounding("float8", torch.device("cuda"))
    check_rounding("float8", torch.device("cpu"))


def test_a_row_is_rounded_by_its_own_largest_magnitude():
    x = torch.tensor([[1.0, -448.0, 0.3], [0.0, 0.0, 0.0], [-2.0, 1.0, 1e-9]])
    rounded = round_rows(x)
    assert (
        rounded.values.float()[:, :2].tolist()
        == [[1.0, -448.0], [0.0, 0.0], [-448.0, 224.0]][: len(x)]
    )
    restored = rounded.values.float() * rounded.scales
    assert ((restored - x).abs() <= x.abs() / 16 + rounded.scales * 2**-10).all()
    alone = round_rows(x[2:])
    assert torch.equal(alone.values.view(torch.uint8), rounded.values[2:].view(torch.uint8))
    assert (
        round_rows(torch.tensor([[1.0, torch.nan], [1.0, torch.inf]]))
        .values.float()
        .isnan()
        .any(dim=1)
        .all()
    )


def test_a_width_that_float8_cannot_multiply_on_cuda_is_refused(small_checkpoint, monkeypatch):
    model = load_model(small_checkpoint, device="cpu")
    monkeypatch.setattr(eight_bits, "WIDTHS", 48)
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True)
    with refuses(ModelError, "a width that float8 cannot multiply on cuda is refused") as refused:
        eight_bits.round_linears(backbone(model.module))
    assert "multiples of 48" in refused.value.wanted


@pytest.mark.parametrize("architecture", ["gpt2", "dbrx"])
def test_a_decoder_whose_layers_would_stay_unrounded_is_refused(tmp_path, architecture):
    """A proof of GPT-2 said float8, whose law is wider, and its numbers were those of float32."""
    experts = {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2}
    heads = {"kv_n_heads": 2, "rope_theta": 10000}
    sizes = {
        "gpt2": {"n_embd": 64, "n_layer": 1, "n_head": 4},
        "dbrx": {"d_model": 64, "n_layers": 1, "n_heads": 4, "ffn_config": experts},
    }
    config = AutoConfig.for_model(
        architecture, vocab_size=300, attn_config=heads, **sizes[architecture]
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with refuses(ModelError, "a decoder whose layers would stay unrounded is refused"):
        load_model(tmp_path / "model", device="cpu", dtype="float8")


@pytest.fixture
def pair(small_checkpoint):
    """The small checkpoint as it is and rounded."""
    return [
        load_model(small_checkpoint, device="cpu", dtype="bfloat16", quantise=q)
        for q in (None, "float8")
    ]


def test_the_decoder_s_weights_are_rounded_and_nothing_else(pair):
    plain, rounded = pair
    assert (rounded.quantised, rounded.dtype, rounded.digest) == (
        "float8",
        plain.dtype,
        plain.digest,
    )
    theirs = dict(rounded.module.named_parameters())
    for name, parameter in plain.module.named_parameters():
        other = theirs[name].data
        size = parameter.float().abs()
        if not name.endswith("_proj.weight"):
            assert torch.equal(other, parameter), name
            continue
        restored = other.float() * theirs[name.replace("weight", "scales")]
        most = size / 16 + size.amax(dim=1, keepdim=True) / 2**18
        error = (restored - parameter.float()).abs()
        assert error.max() > 0
        assert (error <= most).all(), name


def test_a_rounded_model_is_a_configuration_of_its_own(pair):
    plain, rounded = pair
    round = Round(block_hash="b", public_key="k", seq_len=16)
    engine, unrounded = (HFEngine(model, batch_size=8, seq_len=16) for model in (rounded, plain))
    proof = prove(rounded, round, range(64), engine=engine)
    assert proof.header.fingerprint.dtype == "float8"
    shifted = prove(rounded, round, range(5, 13), engine=engine)
    assert shifted.distances.tolist() == proof.distances[5:13].tolist()
    assert (
        0
        < (proof.distances - prove(plain, round, range(64), engine=unrounded).distances).std()
        < 0.01
    )
    # Between formats without a law nothing is accused, and nothing passes, by accident.
    assert [verify(proof, judge).verdict for judge in (plain, rounded)] == ["undecided"] * 2
