"""The measured r_target: against the closed form, its interval, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from assay import stats, streams
from assay.errors import UsageError
from assay.poc import Round, measure_r_target, prove
from assay.poc.protocol import block_target
from assay.poc.verdict._targets import distances_from, r_target_from


def random_directions(n: int, size: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(n, size))


@pytest.mark.parametrize("size", [12, 64])
@pytest.mark.parametrize("rate", [0.1, 0.5905])
def test_random_directions_have_the_closed_form(size: int, rate: float):
    round = Round(block_hash="b", public_key="k")
    found = r_target_from(distances_from(random_directions(8000, size), round), rate, size)
    assert abs(found.off_in_standard_errors) < 3
    assert found.low < found.measured < found.high
    error = stats.rate_standard_error(rate, 8000) / float(stats.chord_pdf(found.r_target, size))
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(400):
        cosines = 2 * rng.beta(31.5, 31.5, size=200) - 1  # of a random direction of R^64
        inside += r_target_from(np.sqrt(2 - 2 * cosines), 0.2, 64).agrees
    low, high = stats.proportion_interval(inside, 400, 0.999)
    assert low <= 0.95 + 0.02
    assert high >= 0.95


def test_the_target_is_the_one_of_the_transform():
    round = Round(block_hash="b", public_key="k", seq_len=8)
    values = np.asarray(streams.get_backend("numpy").normals(streams.seeds(["b_target"]), 12)).ravel()
    assert block_target(round, 12).numpy() == pytest.approx(values / np.linalg.norm(values))
    axis = block_target(round, 12).numpy()
    assert distances_from(np.stack([axis, -axis, 5 * axis]), round) == pytest.approx([0, 2, 0], abs=1e-7)


def test_a_proof_knows_its_dimension(small_model):
    round = Round(block_hash="b", public_key="k", seq_len=8)
    proof = prove(small_model, round, range(64))
    found = measure_r_target(proof, 0.5)
    assert (found.dimension, found.n) == (8192, 64)
    assert found.r_target == stats.r_target_for(0.5, 8192)
    assert found.measured == np.median(proof.distances)
    vectors = measure_r_target(prove(small_model, replace(round, preset="artifact"), range(64)), 0.5)
    assert vectors.dimension == 12
    assert vectors.low < vectors.measured < vectors.high
    with pytest.raises(UsageError, match="--dimension 5"):
        measure_r_target(proof, 0.5, dimension=5)


def test_a_trained_head_needs_its_dimension(small_model):
    proof = prove(small_model, Round(block_hash="b", public_key="k", seq_len=8, preset="permutation"), range(32))
    with pytest.raises(UsageError, match="permutation"):
        measure_r_target(proof, 0.5)
    assert measure_r_target(proof, 0.5, dimension=small_model.vocab_size).dimension == small_model.vocab_size


@pytest.mark.parametrize(("n", "rate"), [(29, 0.5), (100, 0.0), (100, 1.0), (100, 2.0)])
def test_too_little_is_refused(n: int, rate: float):
    with pytest.raises(UsageError, match="nonces for a valid rate"):
        r_target_from(np.full(n, 1.4), rate, 8192)
