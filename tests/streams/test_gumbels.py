"""Gumbel numbers: the mathematics they stand for, and the same bits everywhere."""

import json

import numpy as np
import pytest

from assay.streams import definition as _definition
from assay.streams import get_backend, seeds
from assay.streams.arrays import as_tensor, digest

from .inverse import VECTORS, dense_hashes, distinct_uniforms, gumbel_hashes, seed_for
from .test_definition import ulps

KNOWN = json.loads((VECTORS / "gumbels.json").read_text())


def gumbels_of(hashes):
    return _definition.gumbels(seed_for(hashes, 0), 0, 1)[:, 0]


def exponentials_of(hashes):
    """``-ln(1 - (h + 1/2) / 2**32)`` in float64, from the smaller of the two probabilities."""
    h = hashes.astype(np.float64)
    return np.where(h < 2**31, -np.log1p(-(h + 0.5) / 2**32), -np.log((2**32 - h - 0.5) / 2**32))


@pytest.fixture(scope="module")
def sample():
    """Hashes of every branch, exponent and edge, in ascending order."""
    return np.unique(np.concatenate([gumbel_hashes(), dense_hashes(1 << 20)]))


def test_every_branch_has_the_same_bits(backend, definition, sample):
    crafted = seed_for(sample, 0)
    assert digest(backend.gumbels(crafted, 1)) == digest(definition.gumbels(crafted, 1))


@pytest.mark.slow
@pytest.mark.parametrize("is_upper", [True, False], ids=["upper half", "lower half"])
def test_every_gumbel_there_is(definition, is_upper):
    """One hash for every float32 under the first logarithm, on either side of the middle."""
    for hashes in distinct_uniforms():
        smaller = hashes[hashes < 2**31]
        crafted = seed_for(smaller if is_upper else ~smaller, 0)
        expected = digest(definition.gumbels(crafted, 1))
        assert digest(get_backend("torch").gumbels(crafted, 1)) == expected


def test_known_answers(backend):
    hashes = np.array([int(row["hash"], 16) for row in KNOWN["hashes"]], np.uint32)
    made = as_tensor(backend.gumbels(seed_for(hashes, 0), 1)).cpu().numpy()[:, 0]
    assert [f"{bits:08x}" for bits in made.view(np.uint32).tolist()] == [
        row["bits"] for row in KNOWN["hashes"]
    ]
    np.testing.assert_array_equal(made, np.float32([row["gumbel"] for row in KNOWN["hashes"]]))
    for row in KNOWN["streams"]:
        made = backend.gumbels(seeds([row["text"]]), row["n"])
        assert digest(made) == row["sha256_le_f32"]
        first = as_tensor(made)[0, :8].cpu().numpy().view(np.uint32)
        assert [f"{bits:08x}" for bits in first.tolist()] == row["first_bits"]


def test_the_numbers_are_right_in_both_tails(sample):
    made = gumbels_of(sample)
    truth = -np.log(exponentials_of(sample))
    near = np.abs(truth) < 1
    assert near.any()
    assert np.abs(made - truth)[near].max() < 1.5e-7
    assert ulps(made, truth)[~near].max() < 2


def test_no_value_on_the_way_is_subnormal(sample):
    """Nor is one 0 that should not be: flush-to-zero modes change nothing."""
    tiny = np.finfo(np.float32).tiny
    x = np.float32(
        2.0**-33
    )  # the least, with the smallest powers of f; next comes the last bit of E near 1
    assert x**3 * np.abs(_definition.LN_POLY).min() > tiny
    assert np.float32(2.0**-24) ** 3 * np.abs(_definition.LN_POLY).min() > tiny
    made = gumbels_of(sample)
    assert not ((made != 0) & (np.abs(made) < tiny)).any()
