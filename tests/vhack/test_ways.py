"""All ways of computing gradients agree with one sample at a time: packed, padded, fused, factored,
side by side.
"""

import copy
import threading
from dataclasses import replace

import pytest
import torch

from assay.models import load_model
from assay.vhack import target_modules, weight_svd
from assay.vhack.directions.gradients import per_sample as _gradients
from assay.vhack.directions.gradients.batches import Segments
from assay.vhack.directions.gradients.gradient_operations import (
    GatedActivation,
    Norm,
    is_plain_norm,
    load_kernels,
    segment_products,
)
from assay.vhack.directions.gradients.per_sample import batches_at_once
from assay.vhack.directions.gradients.replica import Recipe, Replica, recipe_for
from assay.vhack.directions.gradients.taps import Tap, TapPlan, exact_factors
from tests.vhack.adapter import worst_error

PLAIN = Recipe(packed=False, factored=False, together=False)
EVERYTHING = Recipe(packed=True, factored=True, together=False)


@pytest.mark.parametrize(
    "recipe",
    [
        PLAIN,
        replace(PLAIN, factored=True),
        replace(PLAIN, packed=True),
        EVERYTHING,
        replace(EVERYTHING, together=True),
        replace(PLAIN, together=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_recipe_is_exact(monkeypatch, gradients_of, wanted, recipe, checkpointing):
    monkeypatch.setattr(_gradients, "recipe_for", lambda *_: recipe)
    assert worst_error(gradients_of(max_tokens=200, checkpointing=checkpointing), wanted) < 1e-5


@pytest.mark.parametrize("how", ["project", "right", "left", "outer"])
def test_every_order_of_the_sum_is_exact(monkeypatch, gradients_of, wanted, how):
    monkeypatch.setattr(
        Tap, "plan", lambda *_: TapPlan(how, how == "left", output=False, input=False)
    )
    assert worst_error(gradients_of(), wanted) < 1e-5


def test_the_cheapest_way_depends_on_shape_length_and_dtype(small_model, small_svd):
    def way(name, tokens, dtype=torch.float32, **changes):
        settings = {
            "factored": True,
            "together": False,
            "checkpointing": False,
            "kernels": None,
            **changes,
        }
        linear = target_modules(small_model)[f"model.layers.0.{name}"]
        tap = Tap(name, linear, small_svd[f"model.layers.0.{name}"], {}, lambda: None, **settings)
        rows = torch.empty(tokens, linear.in_features, dtype=dtype)
        return tap.plan(rows, Segments.of([tokens], rows.device))

    assert [way("self_attn.q_proj", tokens).order for tokens in (32, 128)] == ["right", "outer"]
    assert way("mlp.up_proj", 32) == TapPlan("right", early=False, output=False, input=True)
    assert way("mlp.down_proj", 32) == TapPlan("left", early=True, output=True, input=False)
    assert way("mlp.up_proj", 32, factored=False).input is False
    assert way("mlp.up_proj", 128, factored=False).order == "right"
    assert way("mlp.up_proj", 128, torch.bfloat16).order == "project"
    assert way("mlp.up_proj", 128, together=True).order == "project"


def test_other_factors_than_the_weights_own_are_not_multiplied_with(
    small_model, small_svd, cut_svd
):
    modules = target_modules(small_model)
    assert exact_factors(modules, small_svd) == set(modules)
    assert exact_factors(modules, cut_svd) == set()
    assert exact_factors(modules, weight_svd(small_model, dtype="bfloat16")) == set()
    first = "model.layers.0.mlp.up_proj"
    second = "model.layers.1.mlp.up_proj"
    swapped = {**small_svd, first: small_svd[second]}
    assert exact_factors(modules, swapped) == set(modules) - {first}


def test_which_models_are_packed(small_checkpoint):
    from transformers import AutoConfig, AutoModelForCausalLM

    def recipe(family, **changes):
        sizes = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "vocab_size": 32,
        }
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
        with torch.random.fork_rng(devices=[]):
            return recipe_for(
                AutoModelForCausalLM.from_config(
                    AutoConfig.for_model(family, **sizes, **heads, **changes)
                )
            )

    assert recipe("qwen3") == EVERYTHING
    assert recipe("gemma2") == replace(PLAIN, factored=True)
    assert recipe("mistral", sliding_window=8) == replace(PLAIN, factored=True)
    model = load_model(small_checkpoint, dtype="bfloat16", device="cpu")
    assert recipe_for(model.module) == replace(EVERYTHING, factored=False)


def _other_attention(layer):
    layer.self_attn.__class__ = type("OtherAttention", (type(layer.self_attn),), {})


def _own_forward(layer):
    layer.mlp.forward = layer.mlp.forward


def _hook(layer):
    layer.self_attn.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("change", [_other_attention, _own_forward, _hook])
def test_a_layer_that_may_compute_something_else_is_not_packed(small_model, change):
    module = copy.deepcopy(small_model.module)
    module.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    assert recipe_for(module) == EVERYTHING, "projections are called as modules, with their hooks"
    change(module.model.layers[1])
    assert recipe_for(module) == replace(PLAIN, factored=True)


def test_hooks_that_transformers_leaves_behind_cost_nothing(two_threads, small_model):
    module = copy.deepcopy(small_model.module)
    module(torch.tensor([[1, 2, 3]]), output_hidden_states=True)
    assert all(layer._forward_hooks for layer in module.model.layers)
    assert recipe_for(module) == EVERYTHING
    assert batches_at_once(module) == 2


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_batches_run_side_by_side(monkeypatch, two_threads, gradients_of, wanted):
    seen = set()
    real = Replica.gradients
    both = threading.Barrier(2, timeout=60)

    def watched(replica, encoded):
        if len(seen) < 2:
            seen.add(threading.get_ident())
            both.wait()
        return real(replica, encoded)

    monkeypatch.setattr(Replica, "gradients", watched)
    found = gradients_of(max_tokens=100)
    assert torch.get_num_threads() == 2
    assert len(seen) == 2
    assert worst_error(found, wanted) < 1e-5


def test_every_core_is_given_a_batch(monkeypatch, two_threads, gradients_of):
    batches = []
    real = Replica.gradients

    def watched(replica, encoded):
        batches.append(sum(len(one.ids) for one in encoded))
        return real(replica, encoded)

    monkeypatch.setattr(Replica, "gradients", watched)
    gradients_of()
    assert len(batches) >= 2


def test_a_model_with_hooks_runs_one_batch_at_a_time(
    monkeypatch, gradients_of, small_model, wanted
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    seen = []
    module = copy.deepcopy(small_model.module)
    module.model.layers[0].register_forward_hook(lambda *_: seen.append(threading.get_ident()))
    found = gradients_of(module, max_tokens=100)
    assert set(seen) == {threading.get_ident()}
    assert worst_error(found, wanted) < 1e-5


def test_a_copy_shares_the_memory_of_the_weights(small_model, small_svd):
    replica = Replica(small_model.module, small_svd, EVERYTHING, factored=(), checkpointing=True)
    pairs = list(
        zip(small_model.module.named_parameters(), replica.module.named_parameters(), strict=True)
    )
    assert all(one.data_ptr() == other.data_ptr() for (_, one), (_, other) in pairs)
    assert [name for (name, _), _ in pairs] == [name for _, (name, _) in pairs]
    assert replica.module.lm_head.weight is replica.module.model.embed_tokens.weight
    assert (
        replica.module.config._attn_implementation != small_model.module.config._attn_implementation
    )
    assert not any("forward" in vars(part) for part in small_model.module.modules())


def test_forward_functions_of_their_own_are_kept(gradients_of, small_model, wanted):
    class Counting(torch.nn.Linear):
        def forward(self, inputs):
            calls.append(inputs.shape)
            return super().forward(inputs)

    calls = []
    module = copy.deepcopy(small_model.module)
    first, second = module.model.layers[:2]
    first.forward = first.forward
    first.self_attn.k_proj.forward = first.self_attn.k_proj.forward
    second.mlp.up_proj.__class__ = Counting
    found = gradients_of(module, max_tokens=10_000)
    assert worst_error(found, wanted) < 1e-5
    assert len(calls) == 1


no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def use(request, device):
    """Numbers drawn in a dtype on a device, and the kernels that it has: those of triton, or torch
    on a CPU.
    """
    if device == "cuda":
        pytest.importorskip("triton")
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device=device).to(request.param)

    kernels = load_kernels(torch.device(device, 0), request.param)
    assert (kernels is None) == (device == "cpu")
    return draw, kernels


@pytest.mark.parametrize("columns", [64, 100, 2560])
def test_the_sum_over_rows_of_each_sample(use, columns):
    draw, kernels = use
    left = draw(700, columns)
    right = draw(700, columns)
    segments = Segments.of([1, 300, 33, 366], left.device)
    found, again = (segment_products(left, right, segments.offsets, kernels) for _ in range(2))
    expected = torch.stack(
        [(left[a:b].double() * right[a:b].double()).sum(0) for a, b in segments.bounds]
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(found, again)


def outcome(function, inputs, gradient):
    """What a function gives, and the gradients of its inputs."""
    leaves = [each.clone().requires_grad_() for each in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, gradient)


def assert_near(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < (1e-6 if theirs.dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("shape", [(37, 2560), (2, 5, 3, 128), (7, 48)])
def test_the_norm_is_that_of_transformers(use, shape):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    draw, kernels = use
    norm = Qwen3RMSNorm(shape[-1], eps=1e-6)
    assert is_plain_norm(norm)
    norm.weight = torch.nn.Parameter(draw(shape[-1]), requires_grad=False)
    inputs = [3 * draw(*shape)]
    gradient = draw(*shape)
    ours = outcome(lambda x: Norm.apply(x, norm.weight, 1e-6, kernels), inputs, gradient)
    assert_near(ours, outcome(norm, inputs, gradient))


@pytest.mark.parametrize("device", DEVICES[1:], indirect=True)
def test_the_kernels_of_the_gate(use):
    draw, kernels = use
    inputs = [4 * draw(33, 700) for _ in range(2)]
    gradient = draw(33, 700)
    ours = outcome(lambda a, b: GatedActivation.apply(a, b, kernels), inputs, gradient)
    assert_near(ours, outcome(lambda a, b: torch.nn.functional.silu(a) * b, inputs, gradient))


def test_a_norm_that_computes_something_else_is_left_alone():
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    assert not is_plain_norm(Gemma2RMSNorm(8))
    assert not is_plain_norm(torch.nn.LayerNorm(8))
