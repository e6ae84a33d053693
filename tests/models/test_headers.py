"""A checkpoint that does not fit its configuration is refused by its headers, before anything is
read or hashed.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from assay.errors import BadWeights
from assay.models import load, load_model, model_info
from assay.models.load import check_loadable, identify
from tests.models.storing import DECODER, make_mixture, rewrite, store

NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"
MORE = EXPERT.replace(".3.", ".8.")
READERS = {
    "load": lambda path: load_model(path, device="cpu"),
    "embeddings": lambda path: load_model(
        path, device="cpu", weights="random-embed", block_hash="b"
    ),
    "identify": lambda path: identify(path, dtype="float32"),
    "check": check_loadable,
}


@pytest.fixture(autouse=True)
def unread(monkeypatch):
    """Fails where a checkpoint is hashed, which reads all of it."""

    def read(*_):
        raise AssertionError("the checkpoint was hashed")

    monkeypatch.setattr(load, "digest_tensors", read)


def refusal(path, reader):
    with pytest.raises(BadWeights) as caught:
        reader(path)
    error = caught.value
    assert error.seen, "what was seen"
    assert error.wanted, "what was wanted"
    assert error.do, "what to do"
    return error


def assert_names(error, *facts):
    """Assert that an error names each fact, in any words."""
    assert [str(fact) for fact in facts if str(fact) not in error.seen] == []


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize(
    ("edit", "facts"),
    [
        (lambda t: t.pop(NORM), [NORM]),
        (lambda t: t.update({"model.norm.scale": torch.ones(3)}), ["model.norm.scale"]),
        (lambda t: t.update({NORM: torch.ones(5)}), [NORM, "[5]", "[32]"]),
    ],
    ids=["missing", "surplus", "shape"],
)
def test_the_file_and_the_tensor_are_named(checkpoint, edit, facts, reader):
    rewrite(checkpoint, edit)
    assert_names(refusal(checkpoint, reader), checkpoint / "model.safetensors", *facts)


def test_a_missing_tensor_is_sought_in_the_file_that_the_index_names(write_checkpoint):
    path = write_checkpoint(shard="10KB")
    file = path / json.loads((path / INDEX).read_text())["weight_map"][NORM]
    rest = load_file(file)
    del rest[NORM]
    save_file(rest, file, metadata={"format": "pt"})
    assert_names(refusal(path, check_loadable), file, NORM)


def test_a_missing_file_of_the_index_is_named(write_checkpoint):
    path = write_checkpoint(shard="10KB")
    file = min(path.glob("*.safetensors"))
    file.unlink()
    assert_names(refusal(path, check_loadable), path / INDEX, file.name)


@pytest.mark.parametrize("kind", ["qwen3-moe", "mixtral"])
def test_experts_that_are_stored_one_by_one_fit(kind, tmp_path):
    path = make_mixture(kind, tmp_path / kind, head_dim=64)
    check_loadable(path)
    assert model_info(path).experts == 8


def test_a_tied_head_inside_a_model_of_images_need_not_be_stored(tmp_path):
    sizes = {"num_hidden_layers": 1, "image_size": 32, "patch_size": 16}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=32, num_attention_heads=2, **sizes),
        text_config=LlamaConfig(**DECODER, tie_word_embeddings=True),
        image_token_index=511,
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert "language_model.model.embed_tokens.weight" in names
    assert not any(name.endswith("lm_head.weight") for name in names)
    check_loadable(tmp_path)


def test_names_without_the_prefix_of_the_decoder_fit(checkpoint):
    def older(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewrite(checkpoint, older)
    check_loadable(checkpoint)


@pytest.mark.parametrize(
    ("edit", "name"),
    [
        (lambda t: t.pop(EXPERT), EXPERT),
        (lambda t: t.update({EXPERT: t[EXPERT][:-1].contiguous()}), EXPERT),
        (lambda t: t.update({MORE: t[EXPERT].clone()}), MORE),
    ],
    ids=["missing", "shape", "surplus"],
)
def test_an_expert_is_named_as_it_is_stored(tmp_path, edit, name):
    path = make_mixture("qwen3-moe", tmp_path / "mixture", head_dim=64)
    rewrite(path, edit)
    assert_names(refusal(path, check_loadable), name)


@pytest.mark.parametrize("form", ["channel-tensors", "block", "awq", "gptq", "packed-zeros"])
def test_a_quantised_checkpoint_is_refused_by_its_headers_too(write_checkpoint, tmp_path, form):
    path = store(
        write_checkpoint("wide", hidden_size=64, intermediate_size=64, head_dim=32),
        tmp_path / "stored",
        form,
    )
    check_loadable(path, device="cpu")
    rewrite(path, lambda tensors: tensors.update({"model.layers.9.extra": torch.ones(2)}))
    error = refusal(path, lambda path: check_loadable(path, device="cpu"))
    assert_names(error, path / "model.safetensors", "model.layers.9.extra")
    rewrite(path, lambda tensors: (tensors.pop("model.layers.9.extra"), tensors.pop(NORM)))
    assert_names(refusal(path, READERS["load"]), path / "model.safetensors", NORM)
