"""How much of a model its directions and its training are about, and that a part is never taken for the whole."""

import json

import pytest
import torch
from safetensors import safe_open

from assay.errors import ModelError
from assay.vhack import Basis, Coverage, extract, per_sample_gradients, target_modules, weight_svd
from assay.vhack.delta import DeltaS
from assay.vhack.gradients.targets import coverage
from tests.vhack.adapter import made, sequential_gradients, worst_error


def with_lora(names):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(made("Llama"), LoraConfig(r=2, target_modules=names, task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    ("family", "fused"), [("Llama", 0), ("Phi3", 2), ("Glm4", 1), ("Qwen3", 0)], ids=lambda value: str(value)
)
def test_fused_projections_are_covered_whole_and_their_gradients_exact(family, fused, samples, byte_tokenizer):
    model = made(family)
    assert coverage(model) == Coverage(1.0, ())
    names = [name for name in target_modules(model) if name.endswith(("qkv_proj", "gate_up_proj"))]
    assert len(names) == 2 * fused
    svd = weight_svd(model)
    found = per_sample_gradients(samples, model, tokenizer=byte_tokenizer, svd=svd)
    assert worst_error(found, sequential_gradients(model, byte_tokenizer, samples, svd)) < 1e-5


OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}
LFM2 = {"full_attn_idxs": [1], "block_auto_adjust_ff_dim": False}
FALCON_H1 = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}


@pytest.mark.parametrize(("family", "changes", "count"), [("OPT", OPT, 6), ("FalconH1", FALCON_H1, 14)])
def test_gradients_of_the_covered_part_of_a_model_are_exact(family, changes, count, samples, byte_tokenizer):
    model = made(family, **changes)
    svd = weight_svd(model, min_coverage=0.0)
    assert len(svd) == count
    found = per_sample_gradients(samples, model, tokenizer=byte_tokenizer, svd=svd)
    assert worst_error(found, sequential_gradients(model, byte_tokenizer, samples, svd)) < 1e-5


WHOLE = ["Llama", "Mistral", "Qwen2", "Qwen3", "Granite", "Gemma2", "Gemma3", "Cohere", "Olmo2", "SmolLM3"]
WHOLE += ["Phi3", "Glm4"]
PARTS = {
    "Mixtral": (0.9999, "gate"),
    "Qwen3Moe": (0.999, "gate"),
    "GptOss": (0.9999, "router"),
    "DeepseekV3": (0.99, "kv_b_proj"),
    "Qwen3Next": (0.98, "in_proj_qkvz"),
    "Jamba": (0.94, "x_proj"),
    "FalconH1": (0.93, "in_proj"),
    "OPT": (0.25, "fc1"),
    "Lfm2": (0.12, "w1"),
}


@pytest.mark.parametrize("family", [*WHOLE, *PARTS])
def test_coverage_of_architectures_is_what_the_documentation_says(family):
    """In the sizes that transformers has as defaults, eight layers of each, without memory."""
    import transformers

    config = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    with torch.device("meta"):
        found = coverage(getattr(transformers, f"{family}ForCausalLM")(config(num_hidden_layers=8)))
    share, left_out = PARTS.get(family, (1.0, ""))
    assert found.share == pytest.approx(share, abs=0.005)
    assert any(name.endswith(left_out) for name in found.left_out) or family in WHOLE


def test_linears_that_an_adapter_has_wrapped_are_covered_like_all_others(samples, byte_tokenizer):
    model = with_lora(["q_proj", "down_proj"])
    names = list(target_modules(model))
    assert len(names) == 14
    assert sum(name.endswith(("q_proj.base_layer", "down_proj.base_layer")) for name in names) == 4
    assert coverage(model) == Coverage(1.0, ())
    plain, svd = made("Llama"), weight_svd(model)
    found = per_sample_gradients(samples, model, tokenizer=byte_tokenizer, svd=svd)
    wanted = sequential_gradients(
        plain, byte_tokenizer, samples, {name: svd[_wrapped(name, svd)] for name in target_modules(plain)}
    )
    assert worst_error({name: found[_wrapped(name, svd)] for name in wanted}, wanted) < 1e-5


def test_the_parameters_of_an_adapter_are_not_counted():
    model = made("Llama")
    adapter = DeltaS(model)
    assert coverage(model) == Coverage(1.0, ())
    adapter.detach()


def _wrapped(name, svd):
    return next(found for found in svd if found.removesuffix(".base_layer").endswith(name))


@pytest.mark.parametrize(
    ("family", "changes", "left_out"),
    [("OPT", OPT, "2 model.decoder.layers.*.fc1"), ("Lfm2", LFM2, "2 model.layers.*.feed_forward.w1")],
)
def test_a_model_that_targets_cover_in_part_is_refused_with_what_they_leave_out(family, changes, left_out):
    model = made(family, **changes)
    with pytest.raises(ModelError) as raised:
        weight_svd(model)
    assert left_out in raised.value.seen
    assert raised.value.wanted.startswith("at least 90%")
    assert "--allow-partial" in raised.value.do
    assert set(weight_svd(model, min_coverage=0.0)) == set(target_modules(model))


def test_a_basis_of_a_part_says_so_also_in_its_file(tmp_path, small_pairs, byte_tokenizer):
    model = made("OPT", **OPT)
    path = tmp_path / "basis.safetensors"
    asked = {"tokenizer": byte_tokenizer, "n_heldout": 0}
    with pytest.raises(ModelError, match="targets cover"):
        extract(small_pairs, model, **asked)
    basis = extract(small_pairs, model, min_coverage=0.0, path=path, **asked)
    sizes = {name: weight.numel() for name, weight in model.named_parameters() if weight.ndim == 2}
    sizes = {name: size for name, size in sizes.items() if "embed" not in name}
    covered = sum(size for name, size in sizes.items() if name.removesuffix(".weight") in basis.axes)
    assert basis.origin.coverage.share == pytest.approx(covered / sum(sizes.values()))
    assert len(basis.origin.coverage.left_out) == len(sizes) - len(basis.axes) == 6
    assert Basis.load(path, model).origin == basis.origin
    with safe_open(path, "pt") as reader:
        assert json.loads(reader.metadata()["coverage"])["share"] == basis.origin.coverage.share


def test_the_file_of_a_whole_model_is_as_it_was(tmp_path, small_model, small_pairs, byte_tokenizer, small_svd):
    path = tmp_path / "basis.safetensors"
    basis = extract(small_pairs, small_model, tokenizer=byte_tokenizer, svd=small_svd, path=path)
    assert basis.origin.coverage == Coverage(1.0, ())
    with safe_open(path, "pt") as reader:
        assert "coverage" not in reader.metadata()
