"""What a block fixes: its folded head, against the head and target of the transform itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from assay.errors import UsageError
from assay.poc import PIPELINES, Round, get_pipeline
from assay.poc.protocol.blocks import block_factor, block_scale, folded_head, has_block_factor
from assay.poc.protocol.transforms import Transform
from tests.wordings import refuses

WIDTH = 48


def round_of(block: str, preset: str = "poc-2.0") -> Round:
    return Round(block_hash=block, public_key="k", seq_len=8, preset=preset)


@pytest.mark.parametrize("preset", ["poc-2.0", "random-head", "layer-normalize"])
def test_the_cosine_of_a_nonce_is_a_product_with_the_folded_head(preset: str):
    """The law of cosines on published distances, with no step of the pipeline but the head."""
    round = round_of("b", preset)
    pipeline = replace(get_pipeline(preset), hidden=())
    transform = Transform(
        round, pipeline, hidden_size=WIDTH, vocab_size=1, device=torch.device("cpu")
    )
    x_ND = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0))
    cosines_N = 1 - transform(x_ND, round.inputs(range(64))).numpy().astype(float) ** 2 / 2
    lengths_N = np.linalg.norm(transform.apply_head(x_ND).numpy(), axis=1) / 0.02
    assert cosines_N * lengths_N == pytest.approx(
        x_ND.numpy() @ folded_head(round, WIDTH), abs=2e-3
    )


@pytest.mark.slow
def test_the_scale_has_mean_one_and_the_spread_of_a_random_length():
    scales = np.array([block_scale(round_of(f"block {i}"), 16) for i in range(400)])
    assert abs(scales.mean() - 1) < 4 * scales.std() / 20
    assert scales.std() == pytest.approx(1 / np.sqrt(32), rel=0.15)
    v_D = folded_head(round_of("block 0"), 16)
    assert block_scale(round_of("block 0"), 16) == pytest.approx(
        np.linalg.norm(v_D) / 3.938, rel=1e-3
    )  # E of chi, 16


def test_only_block_and_preset_matter_and_the_caller_owns_the_array():
    one = round_of("b")
    other = replace(round_of("b"), public_key="other", node_count=3, seq_len=64, r_target=0.5)
    folded_head(one, WIDTH)[:] = 0.0
    assert np.array_equal(folded_head(one, WIDTH), folded_head(other, WIDTH))
    assert block_scale(one, WIDTH) == block_scale(other, WIDTH) != block_scale(round_of("c"), WIDTH)


def test_presets_without_a_random_head_have_no_scale():
    assert block_scale(round_of("b", "artifact"), WIDTH) == 1.0
    assert block_scale(round_of("b", "permutation"), WIDTH) == 1.0
    for size in (0, 2**16 + 1):
        with refuses(UsageError, "presets without a random head have no scale"):
            block_scale(round_of("b"), size)


def test_the_factor_of_a_block_is_the_width_of_its_cosines():
    """States with most energy in two coordinates, through the transform itself, against the
    prediction.
    """
    rng = np.random.default_rng(0)
    x_ND = rng.normal(size=(3000, WIDTH))
    x_ND[:, 5] *= 7
    x_ND[:, 9] *= 4
    shape = {"hidden_size": WIDTH, "vocab_size": 1, "device": torch.device("cpu")}
    for block in ("a", "b", "c"):
        round = round_of(block)
        found = block_factor(round, x_ND[:400])
        transform = Transform(round, get_pipeline("poc-2.0"), **shape)
        distances_N = (
            transform(torch.from_numpy(x_ND).float(), round.inputs(range(3000))).double().numpy()
        )
        width = np.sqrt(np.mean((1 - distances_N**2 / 2) ** 2) * 8192)
        assert found.value == pytest.approx(width, abs=4 * found.error + 0.05)
        assert found.law.scale == found.value
        assert found.law.factor_error == pytest.approx(found.error)
        assert 10 < found.effective_dimension < 30  # eight reflections of 48 coordinates keep half
    assert found.n == 400


def test_states_of_one_kind_have_a_factor_that_is_known():
    found = block_factor(round_of("b"), np.eye(WIDTH)[[3, 3]])
    assert (found.error, found.law.factor_error) == (0.0, 0.0)
    with refuses(UsageError, "states of one kind have a factor that is known"):
        block_factor(round_of("b", "random-head"), np.ones((4, WIDTH)))
    assert [name for name in PIPELINES if has_block_factor(get_pipeline(name))] == ["poc-2.0"]
