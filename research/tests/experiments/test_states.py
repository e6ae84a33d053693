"""The experiments' way through pipelines gives what a proof gives."""

import math

import numpy as np
import pytest
from assay_research.runs.states import effective_dimension, published

from assay.errors import UsageError
from assay.poc import HFEngine, Round, get_pipeline, prove

NONCES = range(11)  # not a multiple of the batch: the last one is padded


@pytest.fixture(scope="module")
def engine(small_model) -> HFEngine:
    return HFEngine(small_model, batch_size=4, seq_len=16)


def test_distances_are_those_of_a_proof(small_model, engine):
    names = ("poc-2.0", "permutation", "random-head")
    round = Round(block_hash="b", public_key="k", seq_len=16)
    found = published(engine, round, [get_pipeline(name) for name in names], NONCES)
    for name in names:
        rounds = Round(block_hash="b", public_key="k", seq_len=16, preset=name)
        proof = prove(small_model, rounds, NONCES, engine=engine)
        assert found[name].tolist() == proof.distances.astype(np.float32).tolist()


@pytest.mark.parametrize("name", ["artifact", "layer-reflections", "hardened"])
def test_vectors_are_those_of_a_proof(name: str, small_model, engine):
    round = Round(block_hash="b", public_key="k", seq_len=16, preset=name)
    found = published(engine, round, [get_pipeline(name)], NONCES)[name]
    proof = prove(small_model, round, NONCES, engine=engine)
    assert found.astype(np.float16).tolist() == [record.vector.tolist() for record in proof.records]


def test_the_effective_dimension():
    rng = np.random.default_rng(2)
    isotropic = rng.normal(size=(800, 48))
    assert effective_dimension(isotropic) == pytest.approx(48, rel=0.05)
    few = isotropic.copy()
    few[:, 4:] *= 1e-3
    assert effective_dimension(few) == pytest.approx(4, rel=0.1)
    assert effective_dimension(np.ones((5, 7))) == pytest.approx(1)
    with pytest.raises(UsageError, match="1 states"):
        effective_dimension(np.ones((1, 7)))
    for value in (0.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="1 of 3 states that are zero or not finite"):
            effective_dimension(np.array([[1.0, 2.0], [value, value], [3.0, 1.0]]))
