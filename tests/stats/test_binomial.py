import math

import pytest

from assay.errors import UsageError
from assay.stats import count_test, proportion_interval


# Smallest number of mismatches that convicts, computed from the binomial tail.
@pytest.mark.parametrize(
    ("n", "p_mismatch", "alpha", "critical"),
    [(200, 5e-4, 0.01, 2), (32, 5e-4, 0.01, 2), (200, 1e-3, 0.01, 3), (10, 1e-3, 0.01, 1), (200, 0.1, 0.05, 28)],
)
def test_critical_counts(n, p_mismatch, alpha, critical):
    assert count_test(critical, n, p_mismatch, alpha).fraud
    assert not count_test(critical - 1, n, p_mismatch, alpha).fraud


def test_p_value_is_the_binomial_tail():
    tail = 1 - sum(math.comb(5, k) * 0.02**k * 0.98 ** (5 - k) for k in range(2))
    assert count_test(2, 5, 0.02, 0.01).p_value == pytest.approx(tail, rel=1e-9)


def test_nothing_checked_is_no_evidence():
    result = count_test(0, 0, 5e-4, 0.01)
    assert (result.p_value, result.fraud) == (1.0, False)


def test_certain_mismatch_never_convicts():
    assert not count_test(7, 7, 1.0, 0.01).fraud


def test_a_p_value_equal_to_alpha_does_not_convict():
    p_value = count_test(1, 1, 0.25, 0.5).p_value
    assert not count_test(1, 1, 0.25, p_value).fraud


@pytest.mark.parametrize("arguments", [(3, 2, 0.1, 0.1), (-1, 2, 0.1, 0.1), (1, 2, 1.1, 0.1), (1, 2, 0.1, math.nan)])
def test_refuses_impossible_arguments(arguments):
    with pytest.raises(UsageError):
        count_test(*arguments)


def test_interval_with_no_successes_is_the_rule_of_three():
    low, high = proportion_interval(0, 300, 0.9)
    assert low == 0.0
    assert high == pytest.approx(1 - 0.05 ** (1 / 300), rel=1e-6)


def test_interval_of_nothing_is_everything():
    assert proportion_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(UsageError):
        proportion_interval(1, 0)
