"""Checkpoints that are stored in eight bits: what is read as it is, and what is refused by its name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from assay.errors import BackendUnavailable, BadWeights, ModelError, UsageError
from assay.models import load_model
from assay.models import quantized as _formats
from assay.models.eight_bits import EightBitExperts, EightBitLinear
from assay.models.load import identify
from assay.models.quantized import check_device, read_format
from assay.poc import HFEngine, Round, calibrate, get_pipeline, prove, verify
from assay.poc.engines.hf import fused as _fused
from assay.poc.engines.hf.fused import LeanDecoder, is_lean
from tests.models.storing import FORMATS, configure, described, restored, rewrite, store
from tests.poc.engines import plain_kernels

NAMES = {"tensor": "float8", "channel": "float8", "channel-tensors": "float8", "int8": "int8-rows"}
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module", params=FORMATS)
def stored(request: pytest.FixtureRequest, small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    """A small checkpoint in each format, and the name of the format."""
    path = store(small_checkpoint, tmp_path_factory.mktemp("stored") / "model", request.param)
    return path, NAMES.get(request.param, "float8-block")


@pytest.fixture(scope="module")
def mixture_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of random weights, whose experts are stacked in the file."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from conftest import SMALL

    path = tmp_path_factory.mktemp("checkpoint") / "mixture"
    config = SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config))
        model.save_pretrained(path, save_original_format=False)
    return path


def test_a_layer_multiplies_by_what_is_stored(stored):
    path, name = stored
    model = load_model(path, device="cpu")
    assert (model.quantised, model.dtype) == (name, torch.bfloat16)
    layer = model.module.get_submodule(LAYER)
    assert isinstance(layer, EightBitLinear)
    x = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(1))
    exact = x.double() @ restored(path, LAYER).T
    error = (layer(x).double() - exact).norm() / exact.norm()
    # Of an input in e4m3 every number is off by up to 1/16, and by 1/127 of the largest in int8.
    assert 1e-3 < error < 0.04
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight


@pytest.mark.parametrize("form", ["channel", "block", "int8"])
def test_experts_stored_one_by_one_are_stacked(mixture_checkpoint: Path, tmp_path: Path, form: str):
    path = store(mixture_checkpoint, tmp_path / "model", form)
    model, plain = load_model(path, device="cpu"), load_model(mixture_checkpoint, device="cpu", dtype="float32")
    experts = model.module.model.layers[0].mlp.experts
    assert isinstance(experts, EightBitExperts)
    x, router = torch.randn(16, 64), plain.module.model.layers[0].mlp.gate
    _, shares, chosen = router(x)
    ours, theirs = experts(x, chosen, shares), plain.module.model.layers[0].mlp.experts(x, chosen, shares)
    assert 1e-3 < (ours - theirs).norm() / theirs.norm() < 0.08
    alone = experts(x[3:4], chosen[3:4], shares[3:4])
    assert torch.equal(alone, ours[3:4])


def test_the_digest_covers_the_scales_and_the_configuration(stored, tmp_path: Path):
    path, _ = stored
    digest = load_model(path, device="cpu").digest
    assert identify(path, dtype="bfloat16").digest == digest
    tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    name = next(name for name in tensors if "weight_scale" in name)
    seen = {digest}
    for changed, stated in (
        (tensors | {name: tensors[name] * 2}, config),
        (tensors, config | {"quantization_config": config["quantization_config"] | {"note": "another"}}),
    ):
        other = tmp_path / str(len(seen))
        other.mkdir()
        save_file(changed, other / "model.safetensors")
        (other / "config.json").write_text(json.dumps(stated))
        seen.add(load_model(other, device="cpu").digest)
    assert len(seen) == 3


def test_a_node_proves_with_it_and_a_validator_verifies(stored):
    path, name = stored
    model = load_model(path, device="cpu")
    round = Round(block_hash="b", public_key="k", seq_len=16)
    first = prove(model, round, range(40), batch_size=8)
    second = prove(model, round, range(40), batch_size=5)
    assert first.header.fingerprint.dtype == name
    again = load_model(path, device="cpu", quantise=name)  # as `verify` asks for what the header states
    engine = HFEngine(again, batch_size=5, seq_len=16)
    verdict = verify(first, again, engine=engine, expect=round, calibration=calibrate(first, second))
    assert verdict.verdict in ("honest", "undecided")
    assert max(map(abs, verdict.residuals)) < 1e-6


def test_compiled_kernels_give_what_the_layers_give(stored, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_fused, "kernels", lambda: plain_kernels)
    model = load_model(stored[0], device="cpu")
    engine = HFEngine(model, batch_size=4, seq_len=8)
    round, pipeline = Round(block_hash="b", public_key="k", seq_len=8), get_pipeline("poc-2.0")
    plain = next(iter(engine.outputs(round, pipeline, range(4))))
    assert plain.shape == (4,)
    assert is_lean(model, 8)
    inputs = engine.inputs(round, range(4))
    states = engine.read(inputs)
    assert torch.equal(LeanDecoder(model, 8).hidden(inputs)[:, -1].float(), states)
    # With the last layer for the last position only, sums have another order and few inputs another rounding.
    assert (LeanDecoder(model, 8).last_hidden(inputs) - states).norm() < 0.03 * states.norm()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes'"),
        ({"quant_method": None}, "quant_method None"),
        ({"quant_method": []}, "quant_method []"),
        ({"activation_scheme": "static"}, "activation_scheme 'static'"),
        ({"fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"weight_block_size": [0, 128]}, "the size of a block"),
        ({"weight_block_size": "128"}, "the size of a block"),
    ],
)
def test_other_float8_configurations_are_refused_by_name(change, said):
    with pytest.raises(ModelError, match=f"is quantised with {said}".replace("[", r"\[")):
        read_format("model", {"quantization_config": described("channel") | change})


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("format",), "nvfp4-pack-quantized", "format 'nvfp4-pack-quantized'"),
        (("format",), "pack-quantized", "input_activations"),
        (("kv_cache_scheme",), {"num_bits": 8}, "kv_cache_scheme"),
        (("config_groups",), {}, "config_groups"),
        (("config_groups", "group_0", "weights", "num_bits"), 4, "num_bits 4"),
        (("config_groups", "group_0", "weights", "strategy"), "group", "strategy 'group'"),
        (("config_groups", "group_0", "weights", "symmetric"), False, "symmetric False"),
        (("config_groups", "group_0", "input_activations"), None, "num_bits None"),
        (("config_groups", "group_0", "input_activations", "dynamic"), False, "dynamic False"),
        (("config_groups", "group_0", "input_activations", "type"), "int", "type 'int'"),
        (("config_groups", "group_0", "output_activations"), {"num_bits": 8}, "output_activations"),
    ],
)
def test_other_compressed_tensors_are_refused_by_name(place, value, said):
    config = described("channel-tensors")
    owner = config
    for key in place[:-1]:
        owner = owner[key]
    owner[place[-1]] = value
    with pytest.raises(ModelError, match=f"is quantised with {said}"):
        read_format("model", {"quantization_config": config})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{LAYER}.weight_scale"), "has 0 tensors of scales"),
        (lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(3, 1)}), "has the shape"),
        (lambda t: t.update({f"{LAYER}.weight_scale": -t[f"{LAYER}.weight_scale"]}), "not positive"),
        (lambda t: t.update({f"{LAYER}.weight_scale": t[f"{LAYER}.weight_scale"] * torch.nan}), "NaN or infinity"),
        (lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"][:-1].contiguous()}), "has the shape"),
        (lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"].view(torch.int8)}), "is stored as I8"),
        (lambda t: t[f"{LAYER}.weight"].view(torch.uint8).fill_(127), "NaN or infinity"),
        (lambda t: t.pop("model.norm.weight"), "'model.norm.weight' is missing"),
        (lambda t: t.update({"model.layers.9.extra": torch.ones(2)}), "surplus"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)}), "no weight of a linear"),
    ],
)
def test_damaged_checkpoints_are_refused(small_checkpoint: Path, tmp_path: Path, change, said):
    path = store(small_checkpoint, tmp_path / "model", "channel-tensors")
    rewrite(path, change)
    with pytest.raises(BadWeights, match=said):
        load_model(path, device="cpu")


def test_a_head_that_is_neither_stored_nor_tied_is_missing(small_checkpoint: Path, tmp_path: Path):
    path = store(small_checkpoint, tmp_path / "model", "channel-tensors")
    configure(path, tie_word_embeddings=False)
    with pytest.raises(BadWeights, match=r"'lm_head\.weight' is missing"):
        load_model(path, device="cpu")


def test_a_stored_format_is_not_rounded_again_nor_asked_of_other_checkpoints(stored, small_checkpoint: Path):
    with pytest.raises(UsageError, match="stored in"):
        load_model(stored[0], device="cpu", quantise="int8")
    with pytest.raises(UsageError, match="stored in"):
        load_model(stored[0], device="cpu", weights="random-all", block_hash="b")
    with pytest.raises(UsageError, match="float8-block"):
        load_model(small_checkpoint, device="cpu", quantise="float8-block")


def cuda(monkeypatch: pytest.MonkeyPatch, *capability: int) -> torch.device:
    """A CUDA device of that capability, where triton is installed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(_formats, "find_spec", lambda name: object())
    return torch.device("cuda")


def form_of(name: str, **more: int) -> _formats.StoredFormat:
    form = read_format("model", {"quantization_config": described(name, **more)})
    assert form is not None
    return form


@pytest.mark.parametrize("form", [form_of("block", block=128), form_of("int8")], ids=lambda form: form.name)
def test_a_format_is_refused_where_it_was_not_tested(form, monkeypatch: pytest.MonkeyPatch):
    check_device(form, cuda(monkeypatch, 9, 0))
    with pytest.raises(BackendUnavailable, match=f"{form.name} on cuda"):
        check_device(form, cuda(monkeypatch, 10, 0))
    device = cuda(monkeypatch, 9, 0)
    monkeypatch.setattr(_formats, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=f"{form.name} on cuda"):
        check_device(form, device)
    check_device(form, torch.device("cpu"))


def test_blocks_of_another_size_are_refused_on_cuda(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(BackendUnavailable, match="a scale for 64 x 64 numbers, on cuda") as refused:
        check_device(form_of("block", block=64), cuda(monkeypatch, 9, 0))
    assert "128 x 128" in refused.value.wanted
