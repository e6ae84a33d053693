"""Further cheaters on a model: what each changes."""

import itertools

import pytest
import torch
from assay_research import model_cheats

from assay.errors import UsageError
from assay.models import load_model
from assay.models.decoder import decoder_layers
from assay.poc import Round, prove
from assay.poc.cheats import weight_of


@pytest.fixture(scope="module")
def in_float8(small_checkpoint):
    return load_model(small_checkpoint, dtype="bfloat16", device="cpu", quantise="float8")


def up_proj(model):
    return decoder_layers(model.module)[0].mlp.up_proj


def test_fp8_weights_are_a_rounding_of_a_few_percent(small_model):
    models = small_model, model_cheats.rounded_fp8(small_model)
    original, rounded = (up_proj(model).weight.detach() for model in models)
    assert 0.005 < (rounded - original).norm() / original.norm() < 0.05


def test_one_scale_serves_a_whole_matrix(in_float8):
    round = Round(block_hash="block_alpha", public_key="node_A", seq_len=16)
    kept = up_proj(in_float8)
    coarse = up_proj(model_cheats.with_one_scale(in_float8))
    assert len(coarse.scales.unique()) == 1 < len(kept.scales.unique())
    assert 0 < (weight_of(coarse) - weight_of(kept)).norm() < 0.06 * weight_of(kept).norm()
    both = model_cheats.with_one_scale(in_float8, inputs=True)
    x = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    assert up_proj(both).arithmetic.round(x).scales.tolist() == [[pytest.approx(4 / 448)]] * 2
    proofs = [
        prove(model, round, range(4), batch_size=4)
        for model in (in_float8, model_cheats.with_one_scale(in_float8), both)
    ]
    for one, other in itertools.combinations(proofs, 2):
        assert (one.distances != other.distances).any()


def test_an_adapted_weight_has_a_low_rank_update_of_the_asked_size(small_model):
    models = small_model, model_cheats.adapted(small_model, rank=3, size=0.05)
    original, changed = (up_proj(model).weight.detach() for model in models)
    update = changed - original
    assert (update.norm() / original.norm()).item() == pytest.approx(0.05, rel=1e-4)
    assert torch.linalg.matrix_rank(update, rtol=1e-3) == 3


def test_fewer_experts_are_refused_where_there_are_none(small_model):
    with pytest.raises(UsageError):
        model_cheats.with_fewer_experts(small_model, 1)
