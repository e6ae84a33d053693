"""Experts in one tensor: the δS gradient of every sample and expert is that of the weights."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from assay.errors import ModelError
from assay.vhack import Basis, extract, per_sample_gradients, target_modules, weight_svd
from assay.vhack.directions.delta import DeltaS
from assay.vhack.directions.gradients import per_sample as _per_sample
from assay.vhack.directions.gradients.replica import recipe_for
from tests.vhack.adapter import SMALL, worst_error
from tests.wordings import refuses

FAMILIES = {
    "Qwen3Moe": {
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "GptOss": {
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention"] * 2,
    },
}


def made(family, implementation="eager", **changes):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **SMALL | {"intermediate_size": 40} | FAMILIES[family] | changes
    )
    config._experts_implementation = implementation
    with torch.random.fork_rng(devices=[]):
        module = (
            getattr(transformers, f"{family}ForCausalLM")
            ._from_config(config, attn_implementation="eager")
            .eval()
        )
    for name, parameter in module.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.2)
    return module


@pytest.fixture(scope="module")
def mixture():
    return made("Qwen3Moe")


@pytest.fixture(scope="module")
def mixture_svd(mixture):
    return weight_svd(mixture)


@pytest.mark.parametrize("changes", [{"together": True}, {"factored": False}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_way_gives_the_same(
    monkeypatch, mixture, mixture_svd, samples, byte_tokenizer, changes, checkpointing
):
    asked = {"tokenizer": byte_tokenizer, "svd": mixture_svd}
    wanted = per_sample_gradients(samples, mixture, **asked)
    recipe = replace(recipe_for(mixture), **changes)
    monkeypatch.setattr(_per_sample, "recipe_for", lambda *_: recipe)
    found = per_sample_gradients(samples, mixture, checkpointing=checkpointing, **asked)
    seen = {name: rows for name, rows in wanted.items() if rows.any()}
    assert worst_error({name: found[name] for name in seen}, seen) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tokens_are_counted_once_for_every_expert_without_padding(
    mixture, mixture_svd, samples, byte_tokenizer, checkpointing
):
    counted = []
    handles = []
    name = "model.layers.1.mlp.experts"
    experts = mixture.get_submodule(name)
    handles.append(
        experts.register_forward_pre_hook(lambda _, given: counted.append(given[1].flatten()))
    )
    for sample in samples:
        text = byte_tokenizer(sample.prompt + sample.completion)["input_ids"]
        mixture(input_ids=torch.tensor([text]))
    handles[0].remove()
    asked = {
        "tokenizer": byte_tokenizer,
        "svd": mixture_svd,
        "max_tokens": 400,
        "checkpointing": checkpointing,
    }
    found = per_sample_gradients(samples, mixture, **asked)
    assert torch.equal(
        found.tokens[name], torch.stack([torch.bincount(index, minlength=6) for index in counted])
    )
    assert found.tokens.keys() == {f"model.layers.{layer}.mlp.experts" for layer in range(2)}


def test_a_basis_of_a_mixture_says_how_many_tokens_its_experts_saw(
    tmp_path, mixture, mixture_svd, small_pairs, byte_tokenizer
):
    path = tmp_path / "basis.safetensors"
    asked = {"tokenizer": byte_tokenizer, "svd": mixture_svd, "n_heldout": 0}
    basis = extract(small_pairs, mixture, path=path, **asked)
    sides = [side for pair in small_pairs for side in pair.samples()]
    counts = per_sample_gradients(sides, mixture, tokenizer=byte_tokenizer, svd=mixture_svd).tokens
    assert basis.origin.tokens == {
        name: tuple(each.sum(dim=0).tolist()) for name, each in counts.items()
    }
    again = Basis.load(path, mixture)
    assert again.origin == basis.origin
    assert set(again.axes) == set(target_modules(mixture))
    few = extract(small_pairs[:4], mixture, **asked).origin.tokens
    assert all(sum(few[name]) < sum(counts) for name, counts in basis.origin.tokens.items())


def test_matrices_of_experts_are_views_of_their_tensor(mixture):
    name = "model.layers.0.mlp.experts"
    linear = target_modules(mixture)[f"{name}.down_proj.3"]
    assert linear.weight.data_ptr() == mixture.get_submodule(name).down_proj[3].data_ptr()
    transposed = target_modules(made("GptOss"))[f"{name}.gate_up_proj.1"]
    assert transposed.weight.shape == (80, 32)
    assert transposed.bias.shape == (80,)


def test_training_of_experts_is_refused(mixture, mixture_svd):
    with refuses(ModelError, "training of experts is refused") as raised:
        DeltaS(mixture, mixture_svd)
    assert "not trained" in raised.value.wanted
    assert not hasattr(mixture, "delta_s")


def test_experts_in_an_unknown_form_are_refused_by_name():
    module = made("Qwen3Moe")
    for layer in module.model.layers:
        del layer.mlp.experts.is_transposed
    with refuses(ModelError, "experts in an unknown form are refused by name"):
        target_modules(module)
