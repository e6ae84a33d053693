from pathlib import Path

import pytest

from assay.models import list_models, model_info

# Counted from the published checkpoints; a tied matrix counts once.
PUBLISHED = {
    "shape:qwen3-0.6b": (596_049_920, 1024, 28, 16, 8, 151_936, 40_960),
    "shape:qwen3-4b": (4_022_468_096, 2560, 36, 32, 8, 151_936, 40_960),
    "shape:qwen3-32b": (32_762_123_264, 5120, 64, 64, 8, 151_936, 40_960),
    "shape:qwen3-30b-a3b": (30_532_122_624, 2048, 48, 32, 4, 151_936, 40_960),
    "shape:llama-3.2-1b": (1_235_814_400, 2048, 16, 32, 8, 128_256, 131_072),
    "shape:llama-3.1-8b": (8_030_261_248, 4096, 32, 32, 8, 128_256, 131_072),
}


@pytest.mark.parametrize("reference", PUBLISHED)
def test_shapes_have_the_published_sizes(reference: str) -> None:
    info = model_info(reference)
    assert PUBLISHED[reference] == (
        info.parameters,
        info.hidden_size,
        info.num_layers,
        info.num_heads,
        info.num_kv_heads,
        info.vocab_size,
        info.max_positions,
    )


def test_the_list_holds_every_bundled_model_trained_ones_first() -> None:
    infos = list_models()
    trained = ["reference:qwen3", "reference:llama", "reference:organism"]
    assert [info.reference for info in infos] == [*trained, *PUBLISHED]
    assert [info.architecture for info in infos[:3]] == ["Qwen3ForCausalLM", "LlamaForCausalLM", "LlamaForCausalLM"]
    assert all(5_000_000 < info.parameters < 12_000_000 and info.licence == "Apache-2.0" for info in infos[:3])
    assert all(info.licence == "no weights included" for info in infos[3:])


def test_a_directory_is_described_without_its_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    info = model_info(checkpoint)
    assert (info.hidden_size, info.num_layers, info.licence) == (32, 2, "unknown")
