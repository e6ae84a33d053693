"""The place test: which patterns it finds, what it leaves to judge, and whom it never calls
faulty.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from assay.errors import UsageError
from assay.stats import place_test
from assay.stats.places import MATERIAL_RATIO, PLACE_ALPHA, SUSPICION, choose_moduli, log_fisher

WHOLE = np.arange(1024)


def noise(rng, n, sd=0.5):
    return 0.1 * np.exp(sd * rng.normal(size=n))


def with_junk(bad_N, seed=0, sd=0.5):
    """Honest noise, ten times larger where it is bad."""
    return noise(np.random.default_rng(seed), bad_N.size, sd) * np.where(bad_N, 10.0, 1.0)


# Fisher's exact test


@given(st.integers(2, 200), st.data())
def test_the_p_value_is_never_below_fishers(n, data):
    held = data.draw(st.integers(0, n))
    large = data.draw(st.integers(0, n))
    hits = data.draw(st.integers(max(0, held + large - n), min(held, large)))
    bound = math.exp(log_fisher(*(np.array(count) for count in (hits, held, large)), n))
    table = [[hits, large - hits], [held - hits, n - large - held + hits]]
    exact = stats.fisher_exact(table, alternative="greater").pvalue
    assert exact <= bound * (1 + 1e-9) <= 1 + 1e-9
    if exact < 1e-3:
        assert bound < 1.5 * exact


# What is found


@pytest.mark.parametrize(
    ("batch_size", "is_bad", "pattern"),
    [
        (16, lambda p: p % 16 == 0, "position mod 16 in 0"),
        (32, lambda p: p % 32 == 0, "position mod 32 in 0"),
        (16, lambda p: p % 16 < 6, "position mod 16 in 0 to 5"),
        (64, lambda p: p % 32 < 8, "position mod 32 in 0 to 7"),
        (8, lambda p: p % 32 < 10, "position mod 32 in 0 to 9"),
        (None, lambda p: p % 32 < 10, "position mod 32 in 0 to 9"),
        (24, lambda p: p % 24 >= 20, "position mod 24 in 20 to 23"),
        (16, lambda p: (p + 3) % 16 < 6, "position mod 16 in 0 to 2, 13 to 15"),
        (32, lambda p: p % 4 == 3, "position mod 4 in 3"),
        (16, lambda p: p // 16 % 3 == 1, "position mod 48 in 16 to 31"),
        (16, lambda p: (p % 16 < 3) | (p % 32 < 10), "position mod 32 in 0 to 9, 16 to 18"),
    ],
)
def test_a_fault_is_found_and_named(batch_size, is_bad, pattern):
    bad = is_bad(WHOLE)
    test = place_test(with_junk(bad, sd=0.2), WHOLE, batch_size=batch_size, honest_size=0.1)
    assert test.faulty
    assert not test.suspected
    assert test.pattern == pattern
    assert test.p_value < 1e-20
    assert np.array_equal(test.set_aside, bad)
    assert test.share == pytest.approx(bad.mean(), abs=0.01)
    assert test.ratio == pytest.approx(10, rel=0.3)


def test_a_sparse_sample_is_enough_for_six_of_sixteen():
    found = 0
    for seed in range(20):
        positions = np.random.default_rng(seed).permutation(4096)[:64]
        bad = positions % 16 < 6
        test = place_test(with_junk(bad, seed), positions, batch_size=32, honest_size=0.1)
        found += test.faulty
        if test.faulty:
            assert test.set_aside[bad].all()
            assert test.set_aside[~bad].mean() < 0.3
    assert found >= 18


def test_places_far_from_each_other_are_added_until_the_rest_is_even():
    bad = np.isin(WHOLE % 16, (1, 4, 9))
    test = place_test(with_junk(bad), WHOLE, batch_size=16, honest_size=0.1)
    assert test.faulty
    assert test.set_aside[bad].all()
    assert test.modulus == 16


def test_order_and_sign_of_the_residuals_do_not_matter():
    values = with_junk(WHOLE % 16 < 3) * np.random.default_rng(2).choice([-1, 1], WHOLE.size)
    order = np.random.default_rng(1).permutation(WHOLE.size)
    one = place_test(values, WHOLE)
    two = place_test(values[order], WHOLE[order])
    assert one == two
    assert np.array_equal(one.set_aside[order], two.set_aside)
    assert (one.modulus, one.places, one.share) == (16, (0, 1, 2), 3 / 16)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_is_largest(broken):
    values = np.where(WHOLE % 16 == 0, broken, noise(np.random.default_rng(0), WHOLE.size))
    test = place_test(values, WHOLE, batch_size=16)
    assert (test.faulty, test.pattern) == (True, "position mod 16 in 0")
    assert 2 < test.ratio < math.inf


# What is left to judge


def test_at_most_half_of_the_places_are_set_aside():
    bad = WHOLE % 16 < 10
    test = place_test(with_junk(bad), WHOLE, batch_size=16)
    assert test.share <= 0.5
    assert test.set_aside.mean() <= 0.5
    assert np.count_nonzero(bad & ~test.set_aside) >= WHOLE.size // 10


def test_a_cheat_everywhere_is_left_to_judge_though_some_places_are_worse():
    values = 5 * with_junk(WHOLE % 16 < 6)
    test = place_test(values, WHOLE, batch_size=16, honest_size=0.1)
    assert test.faulty
    assert np.median(values[~test.set_aside]) > 0.4


def test_a_cheat_without_regard_to_places_is_neither_faulty_nor_suspected():
    rng = np.random.default_rng(0)
    tests = [
        place_test(with_junk(rng.random(256) < 0.4, seed), np.arange(256)) for seed in range(50)
    ]
    assert not any(test.faulty for test in tests)
    assert sum(test.suspected for test in tests) <= 5


# What is no fault


@pytest.mark.parametrize(
    "draw", [noise, lambda rng, n: rng.standard_t(3, n), lambda rng, n: rng.integers(0, 3, n) / 8]
)
@pytest.mark.parametrize("n", [64, 256])
def test_honest_noise_is_not_faulty(draw, n):
    """The p-value of residuals that do not depend on the place is no smaller than uniform."""
    rng = np.random.default_rng(n)
    tests = [
        place_test(draw(rng, n), np.sort(rng.permutation(4096)[:n]), batch_size=32)
        for _ in range(60)
    ]
    assert not any(test.faulty for test in tests)
    assert sum(test.suspected for test in tests) <= stats.binom(60, SUSPICION).isf(1e-3)
    assert not any(test.set_aside.any() for test in tests if not test.suspected)


def test_a_small_dependence_in_many_residuals_is_no_fault():
    positions = np.arange(4096)
    values = noise(np.random.default_rng(0), 4096, sd=0.2) * np.where(positions % 16 < 6, 1.3, 1.0)
    test = place_test(values, positions, batch_size=16)
    assert test.p_value < PLACE_ALPHA
    assert 1.2 < test.ratio < MATERIAL_RATIO
    assert (test.faulty, test.suspected) == (False, True)


def test_rounding_at_some_places_of_machines_that_agree_elsewhere_is_no_fault():
    values = np.where(WHOLE % 16 < 6, noise(np.random.default_rng(0), WHOLE.size), 0.0)
    assert place_test(values, WHOLE, honest_size=0.0).ratio == math.inf
    assert place_test(values, WHOLE, honest_size=0.0).faulty
    assert not place_test(values, WHOLE, honest_size=0.1).faulty


@pytest.mark.parametrize("n", [0, 1, 2, 7])
@pytest.mark.parametrize("value", [0.0, 1.0, math.nan])
def test_equal_residuals_say_nothing(n, value):
    test = place_test(np.full(n, value), np.arange(n), batch_size=4)
    assert (test.faulty, test.suspected, test.p_value, test.ratio) == (False, False, 1.0, 1.0)
    assert test.set_aside.shape == (n,)


# What a prover may state


@pytest.mark.parametrize("batch_size", [1, 7, 60, 255, 1024, 10**18])
def test_any_stated_batch_size_gives_a_bounded_number_of_patterns(batch_size):
    moduli = choose_moduli(batch_size)
    assert len(moduli) <= 40
    assert 2 <= min(moduli) <= max(moduli) <= 256
    assert (
        place_test(with_junk(WHOLE % 16 == 0), WHOLE, batch_size=batch_size).pattern
        == "position mod 16 in 0"
    )


@pytest.mark.parametrize(
    ("values", "positions", "options", "field"),
    [
        ([0.1, 0.2], [0], {}, "positions"),
        ([[0.1]], [[0]], {}, "positions"),
        ([0.1, 0.2], [0, -1], {}, "positions"),
        ([0.1, 0.2], [0.0, 1.0], {}, "positions"),
        ([0.1, 0.2], [0, 1], {"batch_size": 0}, ""),
        ([0.1, 0.2], [0, 1], {"honest_size": -1.0}, ""),
        ([0.1, 0.2], [0, 1], {"honest_size": math.nan}, ""),
    ],
)
def test_what_is_out_of_range_is_refused(values, positions, options, field):
    with pytest.raises(UsageError) as refusal:
        place_test(values, positions, **options)
    assert refusal.value.field == field
