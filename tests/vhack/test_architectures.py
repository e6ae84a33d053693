"""Models that are built in other ways than Llama: their gradients are those of the weights, or they
are refused.
"""

import json

import pytest
import torch
from safetensors import safe_open

from assay.errors import ModelError
from assay.vhack import Basis, Coverage, extract, target_modules, weight_svd
from assay.vhack.directions.delta import DeltaS
from assay.vhack.directions.gradients.targets import coverage
from tests.models.zoo import OPT, PASSES_ONLY, USUAL, ZOO, random_model
from tests.usual import usual
from tests.vhack.adapter import made, of_weights, sequential_gradients, worst_error
from tests.wordings import refuses

MATRICES = {"Granite": 14, "Qwen2": 14, "Phi3 longrope": 8, "OPT": 6, "FalconH1": 14}


@pytest.mark.parametrize("name", usual((*ZOO, *PASSES_ONLY), *USUAL))
def test_gradients_are_those_of_the_weights(name, gradients_of, samples, byte_tokenizer):
    module = random_model(name).module
    svd = weight_svd(module, min_coverage=0.0)
    assert MATRICES.get(name, len(svd)) == len(svd)
    found = gradients_of(module, svd=svd)
    wanted = of_weights(module, byte_tokenizer, samples, svd)
    reached = {name for name in wanted if wanted[name].any()}
    assert reached
    assert not any(found[name].any() for name in found.keys() - reached)
    assert worst_error(*({name: rows[name] for name in reached} for rows in (found, wanted))) < 1e-5


def test_prefixes_that_peft_has_learnt_take_part(gradients_of, samples, byte_tokenizer):
    """Samples of a Qwen2 are packed by themselves, without what stands before each of them."""
    from peft import PrefixTuningConfig, get_peft_model

    module = get_peft_model(
        made("Qwen2"), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    ).eval()
    module.requires_grad_(True)
    svd = weight_svd(module)
    assert (
        worst_error(gradients_of(module, svd=svd), of_weights(module, byte_tokenizer, samples, svd))
        < 1e-5
    )


def test_linears_that_an_adapter_has_wrapped_are_covered_like_all_others(
    gradients_of, samples, byte_tokenizer
):
    from peft import LoraConfig, get_peft_model

    asked = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(made("Llama"), asked)
    plain = made("Llama")
    assert (
        sum(
            name.endswith(("q_proj.base_layer", "down_proj.base_layer"))
            for name in target_modules(model)
        )
        == 4
    )
    assert coverage(model) == Coverage(1.0, ())
    svd = weight_svd(model)
    named = {
        n: next(f for f in svd if f.removesuffix(".base_layer").endswith(n))
        for n in target_modules(plain)
    }
    wanted = sequential_gradients(
        plain, byte_tokenizer, samples, {name: svd[own] for name, own in named.items()}
    )
    found = gradients_of(model, svd=svd)
    assert worst_error({name: found[own] for name, own in named.items()}, wanted) < 1e-5


def test_a_layer_for_which_the_intermediate_sizes_are_a_list_has_a_budget(gradients_of, samples):
    kinds = ["sliding_attention", "full_attention"] * 3
    small = {
        "num_hidden_layers": 6,
        "layer_types": kinds,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
    }
    module = made(
        "Gemma3n",
        "TextConfig",
        **small,
        activation_sparsity_pattern=[0.0] * 6,
        hidden_size_per_layer_input=8,
    )
    assert len(module.config.intermediate_size) == 6
    found = gradients_of(module, svd=weight_svd(module, min_coverage=0.0))
    assert all(len(rows) == len(samples) for rows in found.values())


@pytest.mark.parametrize("way", ["config", "module"])
def test_attention_that_sees_later_tokens_is_refused(way):
    if way == "config":
        module = made("Llama")
        module.config.is_causal = False
    else:
        module = made("Gemma3", "TextConfig", use_bidirectional_attention=True)
    with refuses(ModelError, "attention that sees later tokens is refused"):
        weight_svd(module)


def test_projections_that_share_a_weight_are_refused():
    """As in Zamba: the gradient of each would be a part, and merging the δS of one would undo that
    of the other.
    """
    module = made("Llama")
    first, second = (layer.mlp.down_proj for layer in module.model.layers)
    second.weight = first.weight
    for use in (target_modules, weight_svd, DeltaS):
        with refuses(ModelError, "projections that share a weight are refused"):
            use(module)


WHOLE = dict.fromkeys(["Llama", "Qwen3", "Gemma3", "Cohere", "Olmo2", "Phi3", "Glm4"], (1.0, ""))
PARTS = {
    "Mixtral": (0.9999, "gate"),
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

    config = getattr(
        transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    )
    with torch.device("meta"):
        found = coverage(getattr(transformers, f"{family}ForCausalLM")(config(num_hidden_layers=8)))
    share, left_out = (WHOLE | PARTS)[family]
    assert found.share == pytest.approx(share, abs=0.005)
    assert any(name.endswith(left_out) for name in found.left_out) or family in WHOLE


def test_the_parameters_of_an_adapter_are_not_counted():
    model = made("Llama")
    adapter = DeltaS(model)
    assert coverage(model) == Coverage(1.0, ())
    adapter.detach()


def test_a_model_that_targets_cover_in_part_is_refused_or_its_basis_says_so(
    tmp_path, small_pairs, byte_tokenizer
):
    model = made("OPT", **OPT)
    path = tmp_path / "basis.safetensors"
    asked = {"tokenizer": byte_tokenizer, "n_heldout": 0}
    with refuses(
        ModelError, "a model that targets cover in part is refused or its basis says so"
    ) as raised:
        extract(small_pairs, model, **asked)
    assert "2 model.decoder.layers.*.fc1" in raised.value.seen
    assert "--set allow_partial=true" in raised.value.do
    basis = extract(small_pairs, model, min_coverage=0.0, path=path, **asked)
    sizes = {name: weight.numel() for name, weight in model.named_parameters() if weight.ndim == 2}
    sizes = {name: size for name, size in sizes.items() if "embed" not in name}
    covered = sum(
        size for name, size in sizes.items() if name.removesuffix(".weight") in basis.axes
    )
    assert basis.origin.coverage.share == pytest.approx(covered / sum(sizes.values()))
    assert len(basis.origin.coverage.left_out) == len(sizes) - len(basis.axes) == 6
    assert Basis.load(path, model).origin == basis.origin
    with safe_open(path, "pt") as reader:
        assert json.loads(reader.metadata()["coverage"])["share"] == basis.origin.coverage.share
    whole = tmp_path / "whole.safetensors"
    assert extract(small_pairs, made("Llama"), path=whole, **asked).origin.coverage == Coverage(
        1.0, ()
    )
    with safe_open(whole, "pt") as reader:
        assert "coverage" not in reader.metadata()
