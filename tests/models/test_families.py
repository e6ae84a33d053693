"""The list of architectures says what transformers builds."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from assay.models.decoder import backbone, decoder_layers
from assay.models.families import ATTENTION_TARGETS, FAMILIES, MLP_TARGETS, TARGETS, attention_window, family_of

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 32,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_is_what_transformers_builds(model_type):
    family = FAMILIES[model_type]
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES))
    assert family_of(module.config) is family
    assert type(backbone(module)).__name__ == f"{family.prefix}Model"
    layer = decoder_layers(module)[0]
    assert type(layer.self_attn).__name__ == f"{family.prefix}Attention"
    linears = {name.rpartition(".")[2] for name, part in layer.named_modules() if isinstance(part, torch.nn.Linear)}
    assert linears == set(TARGETS) == {*ATTENTION_TARGETS, *MLP_TARGETS}
    assert hasattr(layer, "residual_multiplier") != family.plain


def test_another_architecture_is_not_listed():
    assert family_of(AutoConfig.for_model("gemma2")) is None


def test_the_shortest_view_of_a_model_is_its_window():
    def window(model_type, **changes):
        return attention_window(AutoConfig.for_model(model_type, num_hidden_layers=4, **changes))

    assert window("llama") is None
    assert window("mistral") == 4096
    assert window("mistral", sliding_window=None) is None
    assert window("qwen2", sliding_window=8) is None, "Qwen2 has windows only where the configuration switches them on"
    assert window("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2) == 8
    assert window("gemma2", sliding_window=16) == 16
    assert window("llama4_text") == 0, "a chunk is no window"
