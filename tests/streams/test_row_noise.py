"""What a sampler does in a step of decoding: the seed of each row's step, and its Gumbel numbers
added in place.
"""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.errors import UsageError
from assay.streams import get_backend, seeds, step_seeds
from assay.streams.arrays import as_tensor, digest

from .inverse import VECTORS
from .test_definition import murmur_without_length

KNOWN = json.loads((VECTORS / "gumbels.json").read_text())["step_seeds"]
TEXTS = [f"response_{i}" for i in range(6)]
WORDS = seeds(TEXTS, strength=256)
STEPS = [0, 1, 31, 2**31 - 1, 2**31, 2**32 - 1]
SEEDS = seeds(TEXTS)[:, 0]


def on(backend, array):
    return as_tensor(array).to(backend.device)


def scores(rows=6, columns=3000):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 5


def expected_sum(before, seeds_N, rows=None):
    """The scores plus the noise of the definition, one float32 addition each."""
    after = before.clone().numpy()
    noise = np.asarray(get_backend("numpy").gumbels(seeds_N, before.shape[1]))
    after[range(len(after)) if rows is None else rows] += noise
    return torch.from_numpy(after)


@pytest.mark.parametrize("columns", [0, 1, 2, 1023, 1024, 1025, 150_001])
def test_rows_of_every_length(backend, columns):
    before = scores(columns=columns)
    made = on(backend, before.clone())
    backend.add_gumbels(made, on(backend, SEEDS))
    assert made.cpu().equal(expected_sum(before, SEEDS))


def test_rows_by_number_leave_the_others_alone(backend):
    before = scores(rows=9)
    rows = np.array([7, 0, 4])
    made = on(backend, before.clone())
    backend.add_gumbels(made, on(backend, SEEDS[:3]), on(backend, rows))
    assert made.cpu().equal(expected_sum(before, SEEDS[:3], rows))
    backend.add_gumbels(made, on(backend, SEEDS[:0]), on(backend, rows[:0]))
    assert made.cpu().equal(expected_sum(before, SEEDS[:3], rows))


def test_a_slice_of_a_padded_vocabulary(backend):
    wide = scores(columns=3072)
    made = on(backend, wide.clone())
    backend.add_gumbels(made[:, 5:3005], on(backend, SEEDS))
    expected = wide.clone()
    expected[:, 5:3005] = expected_sum(wide[:, 5:3005], SEEDS)
    assert made.cpu().equal(expected)
    backend.add_gumbels(made[2:3, :100], on(backend, SEEDS[:1]))
    expected[2:3, :100] = expected_sum(expected[2:3, :100], SEEDS[:1])
    assert made.cpu().equal(expected)


def test_a_forbidden_token_stays_forbidden(backend):
    made = on(backend, torch.full((6, 500), -torch.inf))
    backend.add_gumbels(made, on(backend, SEEDS))
    assert (made == -torch.inf).all()


def test_scores_of_a_model_that_learns_and_seeds_of_the_same_bits_in_int32(backend):
    made = on(backend, scores()).requires_grad_()
    backend.add_gumbels(made, on(backend, SEEDS.view(np.int32)))
    assert made.detach().cpu().equal(expected_sum(scores(), SEEDS))


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"scores_RV": scores().double()}, "scores"),
        ({"scores_RV": scores().half()}, "scores"),
        ({"scores_RV": scores()[0]}, "scores"),
        ({"scores_RV": scores().T}, "scores"),
        ({"scores_RV": scores()[:1].expand(6, -1)}, "scores"),
        ({"scores_RV": scores().to("meta")}, "scores"),
        ({"seeds_N": SEEDS.astype(np.int64)}, "seeds"),
        ({"seeds_N": SEEDS[:, None]}, "seeds"),
        ({"seeds_N": SEEDS[:5]}, "seeds"),
        ({"rows_N": np.array([0, 1])}, "seeds"),
        ({"rows_N": np.arange(6).astype(np.int32)}, "rows"),
        ({"rows_N": np.arange(1, 7)}, "rows"),
        ({"rows_N": np.arange(-1, 5)}, "rows"),
    ],
)
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_arguments_that_are_refused_are_named(name, wrong, field):
    arguments = {"scores_RV": scores(), "seeds_N": SEEDS} | wrong
    with pytest.raises(UsageError) as refusal:
        get_backend(name).add_gumbels(**arguments)
    assert refusal.value.field == field


def test_known_seeds_of_steps(backend):
    for row in KNOWN:
        words = seeds([row["text"]], strength=256)
        made = step_seeds(seeds([row["text"]], strength=256), row["steps"])
        assert [f"{word:08x}" for word in words[0].tolist()] == row["words"]
        assert made.dtype == np.uint32
        assert [f"{seed:08x}" for seed in made[0].tolist()] == row["seeds"]
        rows = on(backend, np.repeat(words, len(row["steps"]), axis=0))
        assert digest(backend.row_seeds(rows, on(backend, np.array(row["steps"])))) == digest(
            made[0]
        )


@given(st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=8), st.integers(0, 2**32 - 1))
def test_a_step_is_hashed_with_every_word(words, step):
    seed = step
    for word in words:
        seed = murmur_without_length(word, seed)
    assert step_seeds([words], [step]).tolist() == [[seed]]


def test_many_rows_and_none(backend):
    many = np.resize(WORDS, (1000, 8))
    expected = step_seeds(WORDS, range(1000))[np.arange(1000) % len(WORDS), range(1000)]
    assert digest(backend.row_seeds(on(backend, many), on(backend, np.arange(1000)))) == digest(
        expected
    )
    assert tuple(backend.row_seeds(on(backend, many[:0]), on(backend, np.arange(0))).shape) == (0,)


ONE_EACH = np.arange(6)


@pytest.mark.parametrize(
    ("function", "words", "steps", "field"),
    [
        (step_seeds, WORDS[:, :7], STEPS, "words"),
        (step_seeds, seeds(TEXTS), STEPS, "words"),
        (step_seeds, WORDS, [STEPS], "words"),
        (step_seeds, WORDS, [2**32], "seeds"),
        (step_seeds, WORDS, [-1], "seeds"),
        (step_seeds, WORDS.astype(float), [0], "seeds"),
        (get_backend().row_seeds, WORDS[:, :7], ONE_EACH, "words"),
        (get_backend().row_seeds, WORDS[:5], ONE_EACH, "words"),
        (get_backend().row_seeds, WORDS.astype(np.int64), ONE_EACH, "words"),
        (get_backend().row_seeds, WORDS, ONE_EACH * 1.0, "steps"),
        (get_backend().row_seeds, WORDS, ONE_EACH[:, None], "steps"),
        (get_backend().row_seeds, as_tensor(WORDS).to("meta"), ONE_EACH, "words"),
    ],
)
def test_bad_words_and_steps_are_named(function, words, steps, field):
    with pytest.raises(UsageError) as refusal:
        function(words, steps)
    assert refusal.value.field == field


@pytest.mark.parametrize("dtype", [np.int64, np.uint32, np.int32])
def test_each_row_has_the_seed_of_its_own_step(backend, dtype):
    steps = np.array(STEPS).astype(np.uint32)
    steps = steps.view(dtype) if dtype == np.int32 else steps.astype(dtype)
    made = backend.row_seeds(on(backend, WORDS.view(np.int32)), on(backend, steps))
    assert str(made.device).startswith(backend.device)
    assert digest(made) == digest(step_seeds(WORDS, STEPS).diagonal())
