import numpy as np
import pytest
import torch

from assay.errors import UsageError
from assay.models import load_model
from assay.models.decoder import decoder_layers
from assay.poc import Proof, cheats, prove
from tests.models.storing import store
from tests.wordings import refuses


def test_rounding_leaves_few_values_per_group(small_model):
    rounded = cheats.rounded(small_model, 4)
    weight = decoder_layers(rounded.module)[0].mlp.up_proj.weight.detach()
    assert max(len(group.unique()) for group in weight.view(-1, 32)) <= 15
    original = decoder_layers(small_model.module)[0].mlp.up_proj.weight.detach()
    error = (weight - original).norm() / original.norm()
    assert 0.03 < error < 0.2
    assert rounded.digest == small_model.digest
    same = (
        rounded.module.get_input_embeddings().weight,
        small_model.module.get_input_embeddings().weight,
    )
    assert torch.equal(*same)


def test_skipping_drops_layers_of_a_copy(small_model):
    assert len(decoder_layers(small_model.module)) == 3
    assert len(cheats.without_last_layers(small_model, 2).module.model.layers) == 1
    assert len(decoder_layers(small_model.module)) == 3
    for count in (0, 3):
        with pytest.raises(UsageError):
            cheats.without_last_layers(small_model, count)


def test_invented_distances_follow_the_chord_law(proof: Proof):
    fake = cheats.invented(proof)
    assert [r.nonce for r in fake.records] == [r.nonce for r in proof.records]
    assert abs(fake.distances.mean() - np.sqrt(2)) < 0.005
    assert not np.array_equal(fake.distances, proof.distances)


def test_cheaters_cheat_on_an_architecture_with_other_names(round_, tmp_path):
    """GPT-2 keeps its layers under another name and its weights turned."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(
            GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=64)
        ).save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu")
    honest = prove(model, round_, range(4), batch_size=4).distances
    for cheat in (cheats.rounded(model, bits=4), cheats.without_last_layers(model, 1)):
        assert (prove(cheat, round_, range(4), batch_size=4).distances != honest).all()


@pytest.fixture(scope="module")
def in_float8(small_checkpoint):
    return load_model(small_checkpoint, dtype="bfloat16", device="cpu", quantise="float8")


def test_weights_in_float8_are_changed_and_rounded_again(in_float8, small_model):
    original, kept = (cheats.weight_of(up_proj(model)) for model in (small_model, in_float8))
    cheat = up_proj(cheats.rounded(in_float8, bits=4))
    assert (cheat.weight.dtype, cheat.scales.shape) == (torch.float8_e4m3fn, (len(kept), 1))
    honest, error = (
        (one - original).norm() / original.norm() for one in (kept, cheats.weight_of(cheat))
    )
    assert 0.005 < honest < 0.05 < error < 0.2


def test_blocks_that_share_a_scale_are_no_rows(in_float8, small_checkpoint, tmp_path):
    stored = load_model(store(small_checkpoint, tmp_path / "blocks", "block"), device="cpu")
    with refuses(UsageError, "blocks that share a scale are no rows"):
        cheats.rounded(stored)


def up_proj(model):
    return decoder_layers(model.module)[0].mlp.up_proj
