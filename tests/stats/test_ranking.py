import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.errors import UsageError
from assay.stats import auroc
from assay.stats.rates import paired_accuracy

SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


@given(SCORES, SCORES)
def test_auroc_is_the_share_of_ordered_pairs(positive, negative):
    wins = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    assert auroc(positive, negative) == pytest.approx(np.mean(wins))


@given(SCORES, SCORES)
def test_auroc_of_the_swapped_sides_is_the_rest(positive, negative):
    assert auroc(positive, negative) + auroc(negative, positive) == pytest.approx(1)


def test_perfect_separation_and_its_opposite():
    assert auroc([2, 3], [0, 1]) == 1.0
    assert auroc([0, 1], [2, 3]) == 0.0


def test_paired_accuracy_counts_ties_as_half():
    assert paired_accuracy([1, 2, 3, 4], [0, 2, 4, 1]) == (1 + 0.5 + 0 + 1) / 4


def test_paired_accuracy_needs_pairs():
    with pytest.raises(UsageError, match="2 positive and 1 negative"):
        paired_accuracy([1, 2], [1])


@pytest.mark.parametrize("function", [auroc, paired_accuracy])
@pytest.mark.parametrize("bad", [[], [math.nan, 1.0], [math.inf, 1.0], [[1.0, 2.0]]])
def test_refuses_missing_scores(function, bad):
    with pytest.raises(UsageError, match="finite"):
        function(bad, [1.0, 2.0])
    with pytest.raises(UsageError, match="finite"):
        function([1.0, 2.0], bad)
