"""The list of architectures says what transformers builds, and the parts of a decoder are found."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from assay.errors import LayersNotFound
from assay.models import load_model
from assay.models.decoder import (
    ATTENTION_TARGETS,
    FAMILIES,
    MLP_TARGETS,
    TARGETS,
    attention_window,
    backbone,
    decoder_layers,
    family_of,
)
from tests.wordings import refuses

from .conftest import SIZES


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_is_what_transformers_builds(model_type):
    family = FAMILIES[model_type]
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES))
    assert family_of(module.config) is family
    assert type(backbone(module)).__name__ == f"{family.prefix}Model"
    layer = decoder_layers(module)[0]
    assert type(layer.self_attn).__name__ == f"{family.prefix}Attention"
    linears = {
        name.rpartition(".")[2]
        for name, part in layer.named_modules()
        if isinstance(part, torch.nn.Linear)
    }
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
    assert window("qwen2", sliding_window=8) is None, (
        "Qwen2 has windows only where the configuration switches them on"
    )
    assert window("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2) == 8
    assert window("gemma2", sliding_window=16) == 16
    assert window("llama4_text") == 0, "a chunk is no window"


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_the_backbone_ends_after_the_final_norm(write_checkpoint, architecture):
    module = load_model(
        write_checkpoint(architecture=architecture), dtype="float32", device="cpu"
    ).module
    with torch.inference_mode():
        ids = torch.arange(12)[None]
        hidden_BTD = backbone(module)(input_ids=ids).last_hidden_state
        logits_BTV = module.get_output_embeddings()(hidden_BTD)
        assert torch.equal(logits_BTV, module(input_ids=ids).logits)
    assert hidden_BTD.shape == (1, 12, 32)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("llama4_text", {"num_local_experts": 2}), ("modernbert-decoder", {})],
)
def test_the_decoder_is_found_where_transformers_returns_something_else(model_type, settings):
    config = AutoConfig.for_model(model_type, **SIZES, pad_token_id=0, **settings)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    assert backbone(module) is module.model
    assert len(decoder_layers(module)) == 2


def test_a_missing_layer_is_not_overlooked(checkpoint):
    module = load_model(checkpoint, device="cpu").module
    del decoder_layers(module)[0]
    with refuses(LayersNotFound, "a missing layer is not overlooked"):
        decoder_layers(module)


@pytest.mark.parametrize("function", [backbone, decoder_layers])
def test_a_module_that_is_no_language_model(function):
    with refuses(LayersNotFound, "a module that is no language model"):
        function(nn.Linear(2, 2))
