"""Every backend against the definition, bit for bit, and the arguments that they all refuse."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.errors import OutOfMemory, UsageError
from assay.streams import DTYPES, get_backend, seeds
from assay.streams.arrays import as_tensor, digest
from assay.streams.torch_backend import tiles

from .inverse import dense_hashes, distinct_uniforms, seed_for, special_hashes

KINDS = ("hashes", "uniforms", "signs", "permutations", "gumbels")
TEXTS = [f"stream_{i}" for i in range(5)]
LENGTHS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1000, 70_001]


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits(backend, definition, kind):
    for n in LENGTHS:
        made = getattr(backend, kind)(seeds(TEXTS), n)
        assert tuple(made.shape) == (5, n)
        assert digest(made) == digest(getattr(definition, kind)(seeds(TEXTS), n))


@pytest.mark.parametrize(
    ("n", "k"), [(0, 0), (1, 0), (1, 1), (5, 2), (1024, 12), (1024, 1023), (1024, 1024)]
)
def test_same_picks(backend, definition, n, k):
    made = backend.picks(seeds(TEXTS), n, k)
    assert tuple(made.shape) == (5, k)
    assert digest(made) == digest(definition.picks(seeds(TEXTS), n, k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [0, 1], ids=["under the logarithm", "under the cosine"])
def test_special_values(backend, definition, dtype, index):
    crafted = seed_for(special_hashes(), index)
    assert digest(backend.normals(crafted, 2, dtype)) == digest(
        definition.normals(crafted, 2, dtype)
    )
    for kind in ("uniforms", "signs"):
        assert digest(getattr(backend, kind)(crafted, 2)) == digest(
            getattr(definition, kind)(crafted, 2)
        )


@pytest.mark.parametrize("index", [0, 1], ids=["under the logarithm", "under the cosine"])
def test_dense_sample_of_all_uniforms(backend, definition, index):
    crafted = seed_for(dense_hashes(1 << 21), index)
    assert digest(backend.normals(crafted, 2)) == digest(definition.normals(crafted, 2))


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1], ids=["under the logarithm", "under the cosine"])
def test_every_uniform_there_is(definition, index):
    for hashes in distinct_uniforms():
        crafted = seed_for(hashes, index)
        expected = digest(definition.normals(crafted, 2))
        assert digest(get_backend("torch").normals(crafted, 2)) == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_formats_at_tiny_values(backend, definition, dtype):
    """A sine within 2**-14 of zero is a subnormal float16; half of these lie near a tie of one of
    the formats.
    """
    tiny = (np.arange(1, 1 << 17, dtype=np.int64) * 5 - (1 << 17)) % 2**32
    crafted = seed_for(tiny.astype(np.uint32), 1)
    wide = definition.normals(crafted, 2)[:, 1]
    assert ((np.abs(wide) < 2**-14) & (wide != 0)).sum() > 1000
    assert digest(backend.normals(crafted, 2, dtype)) == digest(
        definition.normals(crafted, 2, dtype)
    )


def test_zero_has_the_same_sign_everywhere(backend):
    """A uniform of exactly 1 makes the radius +0; the signs of both zeros are then those of cosine
    and sine.
    """
    u2 = np.array(
        [0x10000000, 0x50000000, 0x90000000, 0xD0000000], np.uint32
    )  # one in each quadrant
    candidates = seed_for(np.uint32(2**32 - 1) - np.arange(128, dtype=np.uint32), 0)
    normals = as_tensor(backend.normals(candidates, 2)).cpu().numpy()
    uniforms = as_tensor(backend.uniforms(candidates, 2)).cpu().numpy()
    assert (uniforms[:, 0] == 1).all()
    assert (normals == 0).all()
    turns = uniforms[:, 1].astype(np.float64)
    assert len(np.unique(np.floor(4 * turns))) == len(u2)
    np.testing.assert_array_equal(np.signbit(normals[:, 0]), np.cos(2 * np.pi * turns) < 0)
    np.testing.assert_array_equal(np.signbit(normals[:, 1]), np.sin(2 * np.pi * turns) < 0)


def test_large_single_stream_crosses_the_tiles(backend, definition):
    for strength in (32, 256):
        seed = seeds(["one long stream"], strength)
        assert digest(backend.normals(seed, 1_000_003)) == digest(
            definition.normals(seed, 1_000_003)
        )


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 2**32 - 1), max_size=4),
    st.integers(0, 600),
    st.sampled_from(DTYPES),
    st.integers(1, 8),
)
def test_cpu_backends_agree_on_anything(words, n, dtype, sub_seeds):
    crafted = np.array([[(w + 77 * s) % 2**32 for s in range(sub_seeds)] for w in words], np.uint32)
    crafted = crafted.reshape(len(words), sub_seeds)
    made = {digest(get_backend(name).normals(crafted, n, dtype)) for name in ("numpy", "torch")}
    assert len(made) == 1


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_no_fused_reflections_on_the_cpu(name):
    """The caller then has the formula itself."""
    assert get_backend(name).reflected(torch.zeros(5, 16), seeds(TEXTS)) is None


def test_seeds_in_every_form(backend):
    expected = digest(backend.normals(np.array([1, 2**32 - 1], np.uint32), 9))
    for form in (
        [1, 2**32 - 1],
        [[1], [2**32 - 1]],
        np.array([1, 2**32 - 1]),
        np.array([9, 1, 9, 2**32 - 1])[1::2],
    ):
        assert digest(backend.normals(form, 9)) == expected


NO_SEEDS = (
    *([-1], [2**32], [2**80], [1.0], [True], ["1"], [None], 7),
    *([[]], [[[1]]], [[1], [2, 3]], np.zeros((2, 0), np.uint32)),
)
NO_COUNTS = (-1, 2**32, 1.5, "4", None)
NO_DTYPES = ("float64", "fp16", None, np.float32)
STRONG = seeds(TEXTS, strength=256)  # whose sub-seeds are for normals only
REFUSED = [
    *(("seeds", "normals", (wrong, 4)) for wrong in NO_SEEDS),
    *(("n", kind, ([1], n)) for kind in (*KINDS, "normals") for n in NO_COUNTS),
    *(("k", "picks", ([1], 4, k)) for k in (-1, 5, 1.5)),
    *(("dtype", "normals", ([1], 4, dtype)) for dtype in NO_DTYPES),
    *(("strength", kind, (STRONG, 4)) for kind in KINDS),
    *(
        ("seeds", "reflected", (torch.zeros(shape), seeds(TEXTS)))
        for shape in ((16,), (4, 16), (5, 4, 4))
    ),
]


@pytest.mark.parametrize(("field", "kind", "arguments"), REFUSED)
def test_bad_arguments_are_named(backend, field, kind, arguments):
    with pytest.raises(UsageError) as refusal:
        getattr(backend, kind)(*arguments)
    assert refusal.value.field == field


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_no_room_is_one_clear_error(name):
    many = np.zeros(1 << 22, np.uint32)  # 2**22 streams of 2**32 - 1 normals are 64 petabytes
    with pytest.raises(OutOfMemory):
        get_backend(name).normals(many, 2**32 - 1)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 60))
def test_tiles_cover_the_grid_once(rows, columns, size):
    covered = np.zeros((rows, columns), int)
    for row, row_stop, column, column_stop in tiles(rows, columns, size):
        assert row_stop - row <= size
        covered[row:row_stop, column:column_stop] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize("empty", [[], np.zeros((0, 1), np.uint32), np.zeros((0, 8), np.uint32)])
def test_no_streams(backend, empty):
    assert tuple(backend.normals(empty, 4).shape) == (0, 4)
