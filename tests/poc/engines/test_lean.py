"""The lean decoder is transformers' decoder: the same states, for every architecture that it claims."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from assay.models import Model
from assay.models.decoder import backbone
from assay.poc.engines.hf.lean import LeanDecoder, lean_decoder

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0,
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
    "llama, biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralForCausalLM, MistralConfig, {"head_dim": 32, "sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32, "num_key_value_heads": 4}),
    "one layer": (Qwen3ForCausalLM, Qwen3Config, {"num_hidden_layers": 1}),
}  # fmt: skip
LENGTH = 24


MIXTURE = (
    Qwen3MoeForCausalLM,
    Qwen3MoeConfig,
    {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "norm_topk_prob": True},
)


def made(kind: str, dtype: torch.dtype = torch.float32) -> Model:
    factory, config, more = MIXTURE if kind == "mixture" else KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = factory(config(**{**SHAPE, **more})).to(dtype).eval()
        for parameter in module.parameters():
            # Biases start as zeros and norms as ones: a weight that is left out must show.
            parameter.data += 0.1 * torch.randn_like(parameter)
    return Model(module, None, kind, "", "trained")


def inputs(model: Model, batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, LENGTH, 64, generator=generator).to(model.dtype)


@torch.inference_mode()
def plain(model: Model) -> torch.Tensor:
    return backbone(model.module)(inputs_embeds=inputs(model), use_cache=False).last_hidden_state


@pytest.mark.parametrize("kind", KINDS)
def test_all_positions_are_those_of_transformers(kind: str):
    model = made(kind)
    assert lean_decoder(model, LENGTH)
    before = plain(model)
    with torch.inference_mode():
        states = LeanDecoder(model, LENGTH).hidden(inputs(model))
    torch.testing.assert_close(states, before, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(plain(model), before, atol=2e-5, rtol=1e-5)  # with fused weights too


def test_weights_that_share_memory_in_another_order_are_not_taken_for_fused_ones():
    model = made("llama")
    before = plain(model)
    for layer in model.module.model.layers:
        attention = layer.self_attn
        linears = [attention.v_proj, attention.k_proj, attention.q_proj]
        whole = torch.cat([linear.weight.data for linear in linears])
        for linear, part in zip(linears, whole.split([len(linear.weight) for linear in linears]), strict=True):
            linear.weight.data = part
    with torch.inference_mode():
        states = LeanDecoder(model, LENGTH).hidden(inputs(model))
        again = LeanDecoder(model, LENGTH).hidden(inputs(model))
    torch.testing.assert_close(states, before, atol=2e-5, rtol=1e-5)
    assert torch.equal(again, states)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_layer_for_the_last_position_gives_its_state(kind: str):
    model = made(kind)
    with torch.inference_mode():
        state = LeanDecoder(model, LENGTH).last_hidden(inputs(model))
    assert state.dtype == torch.float32
    torch.testing.assert_close(state, plain(model)[:, -1], atol=2e-5, rtol=1e-5)


def test_bfloat16_rounds_where_transformers_rounds():
    model = made("qwen3", torch.bfloat16)
    with torch.inference_mode():
        states = LeanDecoder(model, LENGTH).hidden(inputs(model))
        state = LeanDecoder(model, LENGTH).last_hidden(inputs(model))
    assert torch.equal(states, plain(model))
    error = (state - states[:, -1].float()).norm() / state.norm()
    assert error < 0.01  # the order of its sums may differ, by the noise of the format


def test_fused_weights_take_the_place_of_the_model_s():
    model = made("llama, biases")
    before = [parameter.clone() for parameter in model.module.parameters()]
    first, second = LeanDecoder(model, LENGTH), LeanDecoder(model, LENGTH)
    attention = model.module.model.layers[1].self_attn
    fused, bias = first._weights[1].qkv
    assert fused.data_ptr() == second._weights[1].qkv[0].data_ptr() == attention.q_proj.weight.data_ptr()
    assert (fused.shape, bias.shape) == ((64 + 2 * 32, 64), (64 + 2 * 32,))
    torch.testing.assert_close(fused[64:96], attention.k_proj.weight.data, atol=0, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.module.parameters(), strict=True))


def test_what_is_not_such_a_decoder_is_left_to_transformers():
    olmo = OlmoForCausalLM(OlmoConfig(**SHAPE)).eval()
    assert not lean_decoder(Model(olmo, None, "olmo", "", "trained"), LENGTH)
    model = made("qwen2")
    handle = model.module.model.layers[0].register_forward_hook(lambda *_: None)
    assert not lean_decoder(model, LENGTH)
    handle.remove()
    assert lean_decoder(model, LENGTH)
    model.module.model.layers[0].mlp.forward = lambda x: x
    assert not lean_decoder(model, LENGTH)
    eager = made("qwen3")
    eager.module.config._attn_implementation = "eager"
    assert not lean_decoder(eager, LENGTH)
    other = made("llama")
    other.module.model.layers[2].mlp.up_proj = type("Adapted", (torch.nn.Linear,), {})(64, 96)
    assert not lean_decoder(other, LENGTH)


def test_hooks_that_transformers_leaves_behind_do_not_count():
    model = made("qwen3")
    model.module(torch.tensor([[1, 2, 3]]), output_hidden_states=True)
    assert any(layer._forward_hooks for layer in model.module.model.layers)
    assert lean_decoder(model, LENGTH)


def test_a_window_matters_where_it_is_shorter_than_the_sequence():
    model = made("mistral")
    model.module.config.sliding_window = LENGTH - 1
    assert not lean_decoder(model, LENGTH)
    assert lean_decoder(model, LENGTH - 1)
