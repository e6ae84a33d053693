"""The definition against the mathematics it stands for, and at the values where it could go
wrong.
"""

import hashlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.errors import UsageError
from assay.streams import definition, seed32, seeds

from .inverse import dense_hashes, seed_for, special_hashes

UINT32 = st.integers(0, 2**32 - 1)


def murmur_without_length(seed, index):
    """One round of the hash in Python integers, written from the published description."""

    def rotate(x, bits):
        return (x << bits | x >> (32 - bits)) % 2**32

    k = rotate(index * 0xCC9E2D51 % 2**32, 15) * 0x1B873593 % 2**32
    h = (rotate(seed ^ k, 13) * 5 + 0xE6546B64) % 2**32
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def ulps(values, truth):
    return np.abs(values.astype(np.float64) - truth) / np.spacing(
        np.abs(truth).astype(np.float32)
    ).astype(np.float64)


def uniforms_of(hashes):
    return hashes.astype(np.float32) * np.float32(2.0**-32)


@pytest.fixture(scope="module")
def sample():
    """Uniforms of every exponent and every edge, without 0."""
    return np.maximum(
        uniforms_of(np.concatenate([special_hashes(), dense_hashes(1 << 20)])), definition.MIN_U1
    )


@given(UINT32, UINT32)
def test_hash_of_any_index(seed, index):
    made = definition.hashes(np.array([seed], np.uint32), index, index + 1)
    assert made.tolist() == [[murmur_without_length(seed, index)]]


@given(UINT32)
def test_uniform_is_the_nearest_float_with_ties_to_even(hash_):
    made = definition.uniforms(seed_for([hash_], [0]), 0, 1)[0, 0]
    exact = Fraction(hash_, 2**32)
    errors = {
        side: abs(Fraction(float(side)) - exact)
        for side in (made, *np.nextafter(made, np.float32([-1, 2])))
    }
    assert errors[made] == min(errors.values())
    if list(errors.values()).count(errors[made]) > 1:
        assert made.view(np.uint32) % 2 == 0


@pytest.mark.parametrize(
    ("hash_", "sign"),
    [(0, -1), (0x80000000, -1), (0x80000080, -1), (0x80000081, 1), (2**32 - 1, 1)],
)
def test_sign_threshold(hash_, sign):
    seed = seed_for([hash_], [0])
    assert definition.signs(seed, 1).tolist() == [[sign]]
    assert (definition.uniforms(seed, 0, 1)[0, 0] > 0.5) == (sign > 0)


def test_normals_are_within_four_ulps(sample):
    u1 = sample
    u2 = np.roll(sample, 1)
    radius = np.sqrt(-2 * np.log(u1.astype(np.float64)))
    quarters = 4 * u2.astype(np.float64)
    angle = (quarters - np.rint(quarters)) * np.pi / 2 + (np.rint(quarters) % 4) * np.pi / 2
    inside = (u1 < 1) & (np.abs(np.cos(angle)) > 1e-6) & (np.abs(np.sin(angle)) > 1e-6)
    for made, truth in zip(
        definition.box_muller(u1, u2), (radius * np.cos(angle), radius * np.sin(angle)), strict=True
    ):
        errors = ulps(made[inside], truth[inside])
        assert errors.max() < 4
        assert np.quantile(errors, 0.99) < 2


def test_no_value_on_the_way_is_subnormal(sample):
    tiny = np.finfo(np.float32).tiny
    f = np.float32(1) - np.float32(2.0**-24)  # nearest to 1, where the powers of f are smallest
    assert (np.float32(1) - f) ** 3 * definition.LN_POLY[-1] > tiny
    made = np.concatenate(
        [*definition.box_muller(sample, np.roll(sample, 1)), definition.negative_log(sample)]
    )
    assert not ((made != 0) & (np.abs(made) < tiny)).any()


@given(UINT32, st.integers(0, 40))
def test_sub_seeds_each_make_their_own_part(seed, n):
    words = (np.uint32(seed) + np.arange(8, dtype=np.uint32) * np.uint32(0x9E3779B9))[None]
    length = -(-n // 8)
    parts = [
        definition.normals(words[:, j : j + 1], min(length, max(0, n - j * length)))
        for j in range(8)
    ]
    np.testing.assert_array_equal(
        definition.normals(words, n), np.concatenate(parts, axis=1)[:, :n]
    )


@given(UINT32, st.integers(1, 300))
def test_permutation_sorts_the_hashes(seed, n):
    seeds = np.array([seed], np.uint32)
    order = definition.permutations(seeds, n)[0]
    assert sorted(order.tolist()) == list(range(n))
    assert (np.diff(definition.hashes(seeds, 0, n)[0, order].astype(np.int64)) > 0).all()


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_words_of_the_digest(texts):
    strong = seeds(texts, strength=256)
    assert strong.shape == (len(texts), 8)
    assert strong.dtype == np.uint32
    for text, words in zip(texts, strong, strict=True):
        assert words.astype(">u4").tobytes() == hashlib.sha256(text.encode()).digest()
        assert words[0] == seed32(text)
    np.testing.assert_array_equal(seeds(texts), strong[:, :1])


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        *(("texts", (texts,)) for texts in ("one text", [b"bytes"], [1], ["\ud800"])),
        *(("strength", (["a"], strength)) for strength in (0, 8, 64, "32")),
    ],
)
def test_bad_texts_and_strengths_are_named(field, arguments):
    with pytest.raises(UsageError) as refusal:
        seeds(*arguments)
    assert refusal.value.field == field


def test_hash_zero_is_clamped_and_uniform_one_gives_zero():
    smallest, largest = np.abs(definition.normals(seed_for([0, 2**32 - 1], [0])[:, None], 2)).max(
        axis=1
    )
    assert 4.7 < smallest < 6.8  # the root of -2 ln 1e-10 is 6.79
    assert largest == 0
