"""Models that are built in other ways than Llama: their gradients are those of the weights, or they are refused."""

import pytest
import torch
from torch.nn import functional

from assay.errors import ModelError
from assay.vhack import per_sample_gradients, target_modules, weight_svd
from assay.vhack.delta import DeltaS
from tests.vhack.adapter import made, worst_error

LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": None,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
SPARSE = {
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 4,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
}


def of_weights(module, tokenizer, samples, svd):
    """The diagonal of Uᵀ G Vhᵀ, where G is what torch finds for the weight itself, one sample at a time, [N, R]."""
    found = {name: [] for name in svd}
    parameters = dict(module.named_parameters())
    for sample in samples:
        module.zero_grad()
        prompt, completion = (tokenizer(text)["input_ids"] for text in (sample.prompt, sample.completion))
        logits = module(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        functional.cross_entropy(logits, torch.tensor(completion)).backward()
        for name, factors in svd.items():
            tensor, _, expert = name.rpartition(".")
            whole = parameters[tensor if tensor in parameters else f"{name}.weight"].grad
            gradient = torch.zeros(len(factors.left), factors.right.shape[1]) if whole is None else whole
            gradient = gradient[int(expert)] if tensor in parameters else gradient
            found[name].append((factors.left.T @ gradient @ factors.right.T).diagonal())
    return {name: torch.stack(rows) for name, rows in found.items()}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        # Each layer runs several times in a pass.
        ("HrmText", {"num_layers_per_stack": 2}),
        # The experts that all tokens share are given them in one row.
        ("Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 16}),
        ("Ernie4_5_Moe", {"moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1}),
        # Attention chooses its keys, and padding would change the choice.
        ("DeepseekV32", LATENT | SPARSE),
        ("Doge", {"keep_window_size": 8}),
        # Its decoder has attention to an encoder that is not there, and says nothing of where it looks.
        ("TrOCR", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}),
        # A context by another name, no position ids, and no target in attention.
        ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "max_position_embeddings": None}),
        (
            "DeepseekV3",
            LATENT
            | {
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_group": 2,
                "topk_group": 1,
                "first_k_dense_replace": 1,
            },
        ),
        ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
        ("BitNet", {}),
        ("StableLm", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_gradients_are_those_of_the_weights(family, changes, samples, byte_tokenizer):
    module = made(family, **changes)
    svd = weight_svd(module, min_coverage=0.0)
    found = per_sample_gradients(samples, module, tokenizer=byte_tokenizer, svd=svd)
    wanted = of_weights(module, byte_tokenizer, samples, svd)
    reached = {name for name in wanted if wanted[name].any()}
    assert reached
    assert not any(found[name].any() for name in found.keys() - reached)
    assert worst_error(*({name: rows[name] for name in reached} for rows in (found, wanted))) < 1e-5


def test_prefixes_that_peft_has_learnt_take_part(samples, byte_tokenizer):
    """Samples of a Qwen2 are packed by themselves, without what stands before each of them."""
    from peft import PrefixTuningConfig, get_peft_model

    module = get_peft_model(made("Qwen2"), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    module.requires_grad_(True)
    svd = weight_svd(module)
    found = per_sample_gradients(samples, module, tokenizer=byte_tokenizer, svd=svd)
    assert worst_error(found, of_weights(module, byte_tokenizer, samples, svd)) < 1e-5


def test_a_layer_for_which_the_intermediate_sizes_are_a_list_has_a_budget(samples, byte_tokenizer):
    kinds = ["sliding_attention", "full_attention"] * 3
    small = {"num_hidden_layers": 6, "layer_types": kinds, "num_kv_shared_layers": 2, "laurel_rank": 4}
    module = made(
        "Gemma3n", "TextConfig", **small, activation_sparsity_pattern=[0.0] * 6, hidden_size_per_layer_input=8
    )
    assert len(module.config.intermediate_size) == 6
    found = per_sample_gradients(samples, module, tokenizer=byte_tokenizer, svd=weight_svd(module, min_coverage=0.0))
    assert all(len(rows) == len(samples) for rows in found.values())


@pytest.mark.parametrize("way", ["config", "module"])
def test_attention_that_sees_later_tokens_is_refused(way):
    if way == "config":
        module = made("Llama")
        module.config.is_causal = False
    else:
        module = made("Gemma3", "TextConfig", use_bidirectional_attention=True)
    with pytest.raises(ModelError, match="not causal"):
        weight_svd(module)


def test_projections_that_share_a_weight_are_refused():
    """As in Zamba: the gradient of each would be a part, and merging the δS of one would undo that of the other."""
    module = made("Llama")
    first, second = (layer.mlp.down_proj for layer in module.model.layers)
    second.weight = first.weight
    for use in (target_modules, weight_svd, DeltaS):
        with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj has the weight of model\.layers\.0\."):
            use(module)
