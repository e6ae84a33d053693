"""Shares, ranks and their intervals: the binomial test, AUROC, and what resampling of groups
covers.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.errors import UsageError
from assay.stats import (
    auroc,
    count_test,
    group_bootstrap,
    grouped_share_interval,
    proportion_interval,
)


# Smallest number of mismatches that convicts, computed from the binomial tail.
@pytest.mark.parametrize(
    ("n", "p_mismatch", "alpha", "critical"),
    [
        (200, 5e-4, 0.01, 2),
        (32, 5e-4, 0.01, 2),
        (200, 1e-3, 0.01, 3),
        (10, 1e-3, 0.01, 1),
        (200, 0.1, 0.05, 28),
    ],
)
def test_critical_counts(n, p_mismatch, alpha, critical):
    assert count_test(critical, n, p_mismatch, alpha).fraud
    assert not count_test(critical - 1, n, p_mismatch, alpha).fraud


def test_p_value_is_the_binomial_tail():
    tail = 1 - sum(math.comb(5, k) * 0.02**k * 0.98 ** (5 - k) for k in range(2))
    assert count_test(2, 5, 0.02, 0.01).p_value == pytest.approx(tail, rel=1e-9)
    nothing = count_test(0, 0, 5e-4, 0.01)
    assert (nothing.p_value, nothing.fraud) == (1.0, False)
    assert not count_test(7, 7, 1.0, 0.01).fraud


def test_interval_with_no_successes_is_the_rule_of_three():
    assert proportion_interval(0, 300, 0.9) == pytest.approx((0.0, 1 - 0.05 ** (1 / 300)), rel=1e-6)
    assert proportion_interval(0, 0) == (0.0, 1.0)


SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


@given(SCORES, SCORES)
def test_auroc_is_the_share_of_ordered_pairs(positive, negative):
    wins = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    assert auroc(positive, negative) == pytest.approx(np.mean(wins))


@pytest.mark.parametrize("bad", [[], [math.nan, 1.0], [math.inf, 1.0], [[1.0, 2.0]]])
def test_refuses_missing_scores(bad):
    with pytest.raises(UsageError):
        auroc(bad, [1.0, 2.0])
    with pytest.raises(UsageError):
        auroc([1.0, 2.0], bad)


def mean(values):
    return float(np.mean(values))


def test_same_seed_same_interval():
    values = np.arange(12.0)
    groups = list("aabbccddeeff")
    first = group_bootstrap(mean, [values], [groups], n_resamples=200, seed=4)
    assert first == group_bootstrap(mean, [values], [groups], n_resamples=200, seed=4)
    assert first != group_bootstrap(mean, [values], [groups], n_resamples=200, seed=5)
    assert first.value == 5.5


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
    interval = group_bootstrap(
        pairs_differ_by_ten, [values, values + 10], [groups, groups], n_resamples=100
    )
    assert (interval.low, interval.high) == (1.0, 1.0)


def test_interval_covers_the_truth_when_rows_of_a_group_are_alike(fewer):
    rng = np.random.default_rng(0)
    covered = 0
    naive = 0
    trials = 200 // fewer
    for trial in range(trials):
        values = np.repeat(rng.normal(size=25), 4) + rng.normal(scale=0.1, size=100)
        groups = np.repeat(np.arange(25), 4).tolist()
        whole = group_bootstrap(mean, [values], [groups], n_resamples=200, seed=trial)
        single = group_bootstrap(mean, [values], [list(range(100))], n_resamples=200, seed=trial)
        covered += whole.low <= 0 <= whole.high
        naive += single.low <= 0 <= single.high
    assert covered / trials > 0.87
    assert naive / trials < 0.75


def test_a_draw_that_leaves_a_sample_empty_is_drawn_again():
    interval = group_bootstrap(
        auroc, [[1.0, 2.0], [0.0, 0.5]], [["a", "b"], ["a", "a"]], n_resamples=60
    )
    assert (interval.low, interval.high) == (1.0, 1.0)


def test_interval_of_shares_is_over_their_groups():
    labels = np.repeat(np.arange(7), 6).tolist()
    assert grouped_share_interval(np.zeros(42), labels) == pytest.approx(proportion_interval(0, 7))
    assert grouped_share_interval(np.ones(42), labels) == pytest.approx(proportion_interval(7, 7))
    some = (np.arange(7) < 2).astype(float)
    assert grouped_share_interval(np.repeat(some, 6), labels) == pytest.approx(
        proportion_interval(2, 7)
    )
    low, high = grouped_share_interval(np.arange(240) < 64, np.repeat(np.arange(30), 8).tolist())
    assert (low, high) == pytest.approx(proportion_interval(8, 30)), (
        "marks of 30 tasks that are alike count as 30"
    )
    assert grouped_share_interval(np.linspace(0, 1, 42), ["the only machine"] * 42) == (0.0, 1.0)


def test_interval_of_shares_near_an_end_or_equal_ones_is_that_of_its_limit():
    labels = np.arange(7).tolist()
    (low, high), (_, exact) = (
        grouped_share_interval([0.0005, *[0.0] * 6], labels),
        proportion_interval(0, 7),
    )
    assert 0 <= low < 0.0005 < exact <= high < exact + 0.01
    least = proportion_interval(7, 7)[0]
    most = grouped_share_interval([0.9995, *[1.0] * 6], labels)[0]
    assert least - 0.01 < most <= least
    low, high = grouped_share_interval(np.full(100, 0.74), range(100))
    assert 0.70 < low < 0.74 < high < 0.76, (
        "a hundred machines that agree are narrower than a hundred coins"
    )


RATES = {
    "one machine of ten is accused": lambda draws, shape: 0.05 * (draws.random(shape) < 0.1),
    "one machine of five is always accused": lambda draws, shape: 1.0 * (draws.random(shape) < 0.2),
    "most are hardly accused": lambda draws, shape: draws.beta(0.05, 5, shape),
    "they differ": lambda draws, shape: draws.beta(2, 8, shape),
    "they agree": lambda draws, shape: 0.7 + 0.1 * draws.random(shape),
}


@pytest.mark.parametrize("machines", [4, 7])
@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
def test_interval_of_shares_covers_the_mean_of_machines(rates, machines: int, fewer: int):
    truth = rates(np.random.default_rng(1), 1_000_000).mean()
    seen = rates(np.random.default_rng(2), (200, machines))[: 200 // fewer]
    intervals = [grouped_share_interval(row, range(machines)) for row in seen]
    assert np.mean([low <= truth <= high for low, high in intervals]) >= 0.95


def spread(values):
    return float(np.std(values)) if len(set(values)) > 1 else math.nan


def nothing(*_):
    return 0.0


NO_COUNTS = ((3, 2, 0.1, 0.1), (-1, 2, 0.1, 0.1), (1, 2, 1.1, 0.1), (1, 2, 0.1, math.nan))
TWO_GROUPS = (nothing, [[1, 2]], [["a", "b"]])
REFUSED = [
    *((count_test, arguments, {}) for arguments in NO_COUNTS),
    (proportion_interval, (1, 0), {}),
    (group_bootstrap, (nothing, [[1, 2]], [["a"]]), {}),
    (group_bootstrap, (nothing, [[1, 2]], [["a", "a"]]), {}),
    (group_bootstrap, TWO_GROUPS, {"n_resamples": 0}),
    (group_bootstrap, TWO_GROUPS, {"confidence": 1.0}),
    (group_bootstrap, (nothing, [[1, 2], []], [["a", "b"], []]), {}),
    # A statistic that some draws do not have, or none.
    (group_bootstrap, (spread, [[1.0, 2.0]], [["a", "b"]]), {"n_resamples": 50}),
    (group_bootstrap, (lambda _: math.nan, [[1.0, 2.0]], [["a", "b"]]), {"n_resamples": 1}),
    (group_bootstrap, (sum, [[1.0, math.inf]], [["a", "b"]]), {"n_resamples": 50}),
    (grouped_share_interval, ([0.5, 0.5], ["a"]), {}),
    (grouped_share_interval, ([0.5, 1.5], ["a", "b"]), {}),
    (grouped_share_interval, ([math.nan], ["a"]), {}),
]


@pytest.mark.parametrize(("function", "arguments", "options"), REFUSED)
def test_what_has_no_interval_or_test_is_refused(function, arguments, options):
    with pytest.raises(UsageError):
        function(*arguments, **options)
