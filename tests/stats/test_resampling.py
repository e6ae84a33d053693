import math

import numpy as np
import pytest

from assay.errors import UsageError
from assay.stats import auroc, group_bootstrap, permutation_p


def mean(values):
    return float(np.mean(values))


def difference(positive, negative):
    return float(np.mean(positive) - np.mean(negative))


def test_same_seed_same_interval():
    values, groups = np.arange(12.0), list("aabbccddeeff")
    first = group_bootstrap(mean, [values], [groups], n_resamples=200, seed=4)
    assert first == group_bootstrap(mean, [values], [groups], n_resamples=200, seed=4)
    assert first != group_bootstrap(mean, [values], [groups], n_resamples=200, seed=5)
    assert (first.value, first.n_groups, first.n_resamples) == (5.5, 6, 200)


def test_groups_are_drawn_whole():
    seen = []

    def record(values):
        seen.append(sorted(values))
        return 0.0

    group_bootstrap(record, [[1, 2, 30, 40]], [["a", "a", "b", "b"]], n_resamples=50)
    assert {tuple(s) for s in seen} == {(1, 1, 2, 2), (1, 2, 30, 40), (30, 30, 40, 40)}


def test_pairs_stay_paired_across_samples():
    def pairs_differ_by_ten(first, second):
        return float(np.all(second - first == 10))

    values = np.arange(20)
    groups = [i // 4 for i in range(20)]
    interval = group_bootstrap(pairs_differ_by_ten, [values, values + 10], [groups, groups], n_resamples=100)
    assert (interval.low, interval.high) == (1.0, 1.0)


def test_interval_covers_the_truth_when_rows_of_a_group_are_alike():
    rng = np.random.default_rng(0)
    covered = naive = 0
    for trial in range(200):
        values = np.repeat(rng.normal(size=25), 4) + rng.normal(scale=0.1, size=100)
        groups = np.repeat(np.arange(25), 4).tolist()
        whole = group_bootstrap(mean, [values], [groups], n_resamples=200, seed=trial)
        single = group_bootstrap(mean, [values], [list(range(100))], n_resamples=200, seed=trial)
        covered += whole.low <= 0 <= whole.high
        naive += single.low <= 0 <= single.high
    assert covered / 200 > 0.87
    assert naive / 200 < 0.75


def test_rows_may_be_vectors():
    rows = np.arange(24.0).reshape(8, 3)
    interval = group_bootstrap(lambda x: float(x[:, 0].mean()), [rows], [list("aabbccdd")], n_resamples=50)
    assert interval.low <= interval.value <= interval.high


def test_a_draw_that_leaves_a_sample_empty_is_drawn_again():
    interval = group_bootstrap(auroc, [[1.0, 2.0], [0.0, 0.5]], [["a", "b"], ["a", "a"]], n_resamples=60)
    assert (interval.low, interval.high) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("samples", "groups", "options"),
    [
        ([[1, 2]], [["a"]], {}),
        ([[1, 2]], [["a", "a"]], {}),
        ([[1, 2]], [["a", "b"]], {"n_resamples": 0}),
        ([[1, 2]], [["a", "b"]], {"confidence": 1.0}),
        ([[1, 2], []], [["a", "b"], []], {}),
    ],
)
def test_bootstrap_refuses_bad_arguments(samples, groups, options):
    with pytest.raises(UsageError):
        group_bootstrap(lambda *_: 0.0, samples, groups, **options)


def test_permutation_of_clear_pairs_counts_every_swap():
    positive, negative = np.arange(5.0) + 1, np.zeros(5)
    p = permutation_p(difference, positive, negative, paired=True, n_permutations=4000)
    assert p == pytest.approx(1 / 32, abs=0.01)


def test_permutation_of_rows_matches_the_exact_count():
    # Only 1 of the C(6, 3) = 20 labellings reaches the observed difference.
    p = permutation_p(difference, [4, 5, 6], [1, 2, 3], n_permutations=4000)
    assert p == pytest.approx(1 / 20, abs=0.012)


def test_permutation_is_deterministic_and_never_zero():
    arguments = (difference, np.arange(50) + 100.0, np.arange(50.0))
    p = permutation_p(*arguments, n_permutations=99, seed=1)
    assert p == permutation_p(*arguments, n_permutations=99, seed=1) == 1 / 100


def test_permutation_p_is_uniform_when_labels_mean_nothing():
    rng = np.random.default_rng(2)
    found = [permutation_p(difference, *rng.normal(size=(2, 10)), n_permutations=99, seed=i) for i in range(300)]
    rejected = np.mean(np.array(found) <= 0.1)
    assert abs(rejected - 0.1) < 4 * math.sqrt(0.09 / 300)


def test_ties_count_as_reaching_the_observed_value():
    assert permutation_p(difference, [1.0, 1.0], [1.0, 1.0], n_permutations=50) == 1.0


@pytest.mark.parametrize(
    ("positive", "negative", "options"),
    [([], [1], {}), ([1], [], {}), ([1], [1], {"n_permutations": 0}), ([1, 2], [1], {"paired": True})],
)
def test_permutation_refuses_bad_arguments(positive, negative, options):
    with pytest.raises(UsageError):
        permutation_p(difference, positive, negative, **options)
