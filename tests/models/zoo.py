"""Small models of the architectures that assay knows, with random weights."""

from typing import Any

import torch

from assay.models import Model
from tests.vhack.adapter import made

LIMIT = 32
"""Length beyond which some of them compute otherwise."""


def rotary(kind: str, **more: Any) -> dict[str, Any]:
    """Settings of rotary embeddings of a type."""
    own = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": LIMIT}
    return {"rope_parameters": own | more}


LONGROPE = rotary("longrope", factor=8.0, short_factor=[1.0] * 4, long_factor=[1.0, 3.0, 5.0, 7.0])
LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
LATENT |= {
    "num_key_value_heads": 4,
    "head_dim": None,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
}
SPARSE = {"index_n_heads": 2, "index_head_dim": 8}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 16}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}
FALCON_H1 = {
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
WINDOW = {"sliding_window": 16}
ZOO: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama longrope": LONGROPE,
    # Its fused projections are one matrix each.
    "Phi3 longrope": LONGROPE | {"original_max_position_embeddings": LIMIT, "eos_token_id": 2},
    "Llama dynamic": rotary("dynamic", factor=4.0),
    "Llama yarn": rotary("yarn", factor=4.0),
    "Llama llama3": rotary("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
    "Mistral": WINDOW,
    "Qwen2": WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "Qwen3": {},
    "Gemma2": WINDOW,
    "Gemma3": WINDOW,
    "Cohere": {},
    "Cohere2": WINDOW,
    "GptOss": WINDOW | MIXTURE,
    # What a model does around its matrices must stay in its numbers: scaled logits, biases, capped
    # logits.
    "Granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5},
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "Olmo2": {},
    "Glm4": {},
    "BitNet": {},
    "Qwen3Moe": EXPERTS,
    # The experts that all tokens share are given them in one row.
    "Qwen2Moe": SHARED,
    "Mixtral": MIXTURE | {"sliding_window": None},
    "DeepseekV3": LATENT | {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    # Attention chooses its keys.
    "DeepseekV32": LATENT | SPARSE | {"index_topk": LIMIT},
    "Doge": {"keep_window_size": 8},
    "OPT": OPT,
    "FalconH1": FALCON_H1,
    # Its positions begin again at 0 where a pass does not say them.
    "Bamba": {
        "attn_layer_indices": [1],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "Lfm2": {"layer_types": ["conv", "full_attention"], "conv_dim": 32, "block_dim": 32},
    "Qwen3Next": SHARED | LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
    "Jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 1,
        "num_experts_per_tok": 1,
    },
    # Its decoder has attention to an encoder that is not there, and says nothing of where it looks.
    "TrOCR": {
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
    },
}
"""Architectures that answer: the name of a family and of a variant, and what its configuration
says.
"""

USUAL = (
    "Llama",
    "Llama longrope",
    "Qwen3",
    "Gemma3",
    "GptOss",
    "Qwen3Moe",
    "DeepseekV3",
    "FalconH1",
)
"""Those of which `make test` takes every test: one of each way to build a decoder."""

PASSES_ONLY: dict[str, dict[str, Any]] = {
    # Each layer runs several times in a pass.
    "HrmText": {"num_layers_per_stack": 2},
    # A context by another name, no position ids, and no target in attention.
    "Mpt": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 256,
        "max_position_embeddings": None,
    },
    # The decoding of MiniMax-Text is not its prefill, in transformers 5.17.
    "MiniMax": {},
}
"""Architectures of which only passes over whole rows are right."""


def random_model(name: str, tokenizer: Any = None) -> Model:
    """A model of one of these, whose weights are large enough for every part to matter."""
    family = name.split()[0]
    module = made(
        family, "TextConfig" if family == "Gemma3" else "Config", **(ZOO | PASSES_ONLY)[name]
    )
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return Model(module, tokenizer, name, "0" * 64, "random-all")
