"""Random weights: the bits of every mode, their digests, and checkpoints that are written with
them.
"""

import json

import numpy as np
import pytest
import torch

from assay import streams
from assay.errors import StorageError, UsageError
from assay.models import load, load_model, save_random
from assay.models import resolve as resolving
from tests.wordings import refuses


def bits(model):
    as_integer = {2: torch.int16, 4: torch.int32}
    return {
        name: p.detach().view(as_integer[p.element_size()]).flatten().tolist()
        for name, p in model.module.named_parameters()
    }


@pytest.fixture
def small_shape(checkpoint, monkeypatch):
    """A shape of the catalogue that is small enough to be made in a test."""
    monkeypatch.setitem(resolving.CATALOGUE, "shape:small", {})
    monkeypatch.setattr(resolving, "BUNDLED", checkpoint)
    (checkpoint / "shapes").mkdir()
    (checkpoint / "config.json").rename(checkpoint / "shapes" / "small.json")
    return "shape:small"


def test_random_all_is_the_documented_stream_for_every_parameter_norms_included(checkpoint):
    model = load_model(
        checkpoint, dtype="float32", device="cpu", weights="random-all", block_hash="b7"
    )
    definition = streams.get_backend("numpy")
    for name, parameter in model.module.named_parameters():
        seeds = streams.seeds([f"b7_{name}"])
        normals = definition.normals(seeds, parameter.numel(), "float32")
        expected = (np.asarray(normals)[0] * np.float32(0.02)).reshape(parameter.shape)
        assert np.array_equal(parameter.detach().numpy(), expected), name


def test_the_cast_is_last_and_to_nearest(checkpoint):
    def load(dtype):
        model = load_model(
            checkpoint, dtype=dtype, device="cpu", weights="random-all", block_hash="b"
        )
        return dict(model.module.named_parameters())

    wide = load("float32")
    narrow = load("bfloat16")
    assert all(torch.equal(wide[name].to(torch.bfloat16), narrow[name]) for name in wide)


@pytest.mark.parametrize("mode", ["random-all", "random-embed"])
def test_random_modes_repeat_and_differ_by_block(checkpoint, mode):
    first, again, other = (
        load_model(checkpoint, device="cpu", weights=mode, block_hash=b) for b in ("a", "a", "b")
    )
    assert bits(first) == bits(again)
    assert bits(first) != bits(other)
    assert first.digest == again.digest != other.digest
    assert first.weights == mode


def test_digests_tell_every_recipe_apart(write_checkpoint, small_shape):
    checkpoint = write_checkpoint("one")
    turned = write_checkpoint("two", rms_norm_eps=1e-3)
    digests = [
        load_model(reference, device="cpu", weights=mode, block_hash=block).digest
        for reference in (checkpoint, turned, small_shape)
        for mode in ("random-all", "random-embed")
        for block in ("a", "b")
    ]
    assert len(set(digests)) == len(digests)


def test_random_embed_replaces_only_the_embeddings_and_a_head_tied_to_them(checkpoint):
    trained = bits(load_model(checkpoint, device="cpu"))
    model = load_model(checkpoint, device="cpu", weights="random-embed", block_hash="a")
    everything = bits(load_model(checkpoint, device="cpu", weights="random-all", block_hash="a"))
    embeddings = "model.embed_tokens.weight"
    mixed = bits(model)
    assert mixed.pop(embeddings) == everything[embeddings] != trained.pop(embeddings)
    assert mixed == trained
    assert model.module.get_output_embeddings().weight is model.module.get_input_embeddings().weight


def test_random_embed_leaves_a_head_of_its_own_alone_and_names_what_it_was_laid_on(
    write_checkpoint,
):
    def nudge(module):
        module.get_parameter("model.norm.weight").data += 1

    one, two = (
        write_checkpoint(name, tie_word_embeddings=False, edit=e)
        for name, e in (("one", None), ("two", nudge))
    )
    trained = bits(load_model(one, device="cpu"))
    laid = [
        load_model(path, device="cpu", weights="random-embed", block_hash="a")
        for path in (one, two)
    ]
    mixed = bits(laid[0])
    assert {name for name in trained if trained[name] != mixed[name]} == {
        "model.embed_tokens.weight"
    }
    assert laid[0].digest != laid[1].digest


def test_a_shape_has_norms_of_one_and_a_default_dtype_and_block(small_shape):
    default = load_model(small_shape, device="cpu")
    assert (default.weights, default.dtype, default.tokenizer) == (
        "random-all",
        torch.bfloat16,
        None,
    )
    norms = {name for name, p in default.module.named_parameters() if bool((p == 1).all())}
    assert norms == {name for name, p in default.module.named_parameters() if p.ndim == 1}
    assert any("q_norm" in name for name in norms)
    named = load_model(small_shape, device="cpu", weights="random-all", block_hash="assay")
    other = load_model(small_shape, device="cpu", weights="random-all", block_hash="b")
    assert bits(default) == bits(named) != bits(other)
    assert default.digest == named.digest != other.digest


@pytest.mark.parametrize("mode", ["random-all", "random-embed"])
def test_a_saved_checkpoint_loads_to_the_same_bits(checkpoint, tmp_path, mode):
    made = load_model(checkpoint, device="cpu", weights=mode, block_hash="b")
    path = save_random(checkpoint, tmp_path / "sub" / "random", weights=mode, block_hash="b")
    loaded = load_model(path, device="cpu")
    for (name, a), (other, b) in zip(
        made.module.named_parameters(), loaded.module.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}


def test_a_temperature_without_sampling_is_saved_as_it_was(checkpoint, tmp_path):
    """The library reads it, which vLLM obeys, and refuses to save it."""
    (checkpoint / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')
    path = save_random(checkpoint, tmp_path / "r", weights="random-all", block_hash="b")
    assert json.loads((path / "generation_config.json").read_text())["temperature"] == 0.6


def test_dtype_and_tokenizer_go_with_it(tmp_path):
    path = save_random(
        "reference:llama", tmp_path / "r", weights="random-all", block_hash="b", dtype="float16"
    )
    model = load_model(path, device="cpu")
    assert model.dtype == torch.float16
    assert model.tokenizer is not None
    assert (
        model.tokenizer("def f():\n")["input_ids"]
        == load_model("reference:llama").tokenizer("def f():\n")["input_ids"]
    )


def test_trained_weights_and_existing_paths_are_usage_errors(checkpoint, tmp_path):
    with refuses(UsageError, "trained weights and existing paths are usage errors"):
        save_random(checkpoint, tmp_path / "r", weights="trained")
    with refuses(UsageError, "trained weights and existing paths are usage errors, 2"):
        save_random(checkpoint, checkpoint, weights="random-all", block_hash="b")


def test_a_checkpoint_that_could_not_be_loaded_again_is_not_written(checkpoint, tmp_path):
    with refuses(UsageError, "a checkpoint that could not be loaded again is not written"):
        save_random(
            checkpoint, tmp_path / "r", weights="random-all", block_hash="b", dtype="float8"
        )
    assert not (tmp_path / "r").exists()


def test_a_failed_write_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    model = load_model(checkpoint, device="cpu", weights="random-all", block_hash="b")
    monkeypatch.setattr(model.module, "save_pretrained", full)
    monkeypatch.setattr(load, "load_model", lambda *a, **k: model)
    before = sorted(tmp_path.iterdir())
    with refuses(StorageError, "a failed write leaves nothing"):
        save_random(checkpoint, tmp_path / "r", weights="random-all", block_hash="b")
    assert sorted(tmp_path.iterdir()) == before
