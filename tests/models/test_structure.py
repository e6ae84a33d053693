from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from assay.errors import LayersNotFound
from assay.models import load_model
from assay.models.decoder import backbone, decoder_layers


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_the_backbone_ends_after_the_final_norm(write_checkpoint: Callable[..., Path], architecture: str) -> None:
    module = load_model(write_checkpoint(architecture=architecture), dtype="float32", device="cpu").module
    with torch.inference_mode():
        ids = torch.arange(12)[None]
        hidden_BTD = backbone(module)(input_ids=ids).last_hidden_state
        logits_BTV = module.get_output_embeddings()(hidden_BTD)
        assert torch.equal(logits_BTV, module(input_ids=ids).logits)
    assert hidden_BTD.shape == (1, 12, 32)


def test_the_layers_are_the_ones_the_model_runs(checkpoint: Path) -> None:
    module = load_model(checkpoint, device="cpu").module
    seen: list[nn.Module] = []
    layers = decoder_layers(module)
    for layer in layers:
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(layer))
    with torch.inference_mode():
        module(input_ids=torch.arange(4)[None])
    assert len(layers) == 2
    assert seen == list(layers)


def test_a_missing_layer_is_not_overlooked(checkpoint: Path) -> None:
    module = load_model(checkpoint, device="cpu").module
    del decoder_layers(module)[0]
    with pytest.raises(LayersNotFound, match="1 layers where the configuration says 2"):
        decoder_layers(module)


def test_layers_under_another_name_are_not_guessed(checkpoint: Path) -> None:
    module = load_model(checkpoint, device="cpu").module
    decoder = backbone(module)
    decoder.strata = decoder.layers
    del decoder.layers
    with pytest.raises(LayersNotFound, match="no list of layers"):
        decoder_layers(module)


@pytest.mark.parametrize("function", [backbone, decoder_layers])
def test_a_module_that_is_no_language_model(function: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(LayersNotFound, match="Linear"):
        function(nn.Linear(2, 2))


def test_a_backbone_alone_has_no_head_to_drop(checkpoint: Path) -> None:
    module = backbone(load_model(checkpoint, device="cpu").module)
    with pytest.raises(LayersNotFound):
        backbone(module)
