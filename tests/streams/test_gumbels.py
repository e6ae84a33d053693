"""Gumbel numbers: the same bits everywhere."""

import numpy as np

from assay.streams import digest, seeds

from .inverse import dense_hashes, seed_for, special_hashes

TEXTS = [f"stream_{i}" for i in range(5)]


def test_every_branch_has_the_same_bits(backend, definition):
    crafted = seed_for(np.concatenate([special_hashes(), dense_hashes(1 << 20)]), 0)
    assert digest(backend.gumbels(crafted, 2)) == digest(definition.gumbels(crafted, 2))


def test_same_bits(backend, definition):
    for n in (0, 1, 7, 4096, 70_001):
        assert digest(backend.gumbels(seeds(TEXTS), n)) == digest(definition.gumbels(seeds(TEXTS), n))
