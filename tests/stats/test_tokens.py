"""Laws of tokens: they sum to 1, and larger noise is a shift of weights."""

import math

import numpy as np
import pytest

from assay.errors import UsageError
from assay.stats import TokenNoise
from assay.stats.token_law import COLUMNS, SCALES, round_profiles
from tests.stats.tokens import law_at, token_profile


def test_a_law_sums_to_one_over_the_vocabulary_whatever_the_gaps_are():
    gaps = np.abs(np.random.default_rng(0).normal(0, 3, 50))
    gaps[7] = math.inf
    every = token_profile(np.tile(gaps, (50, 1)), np.arange(50))
    law = law_at(0.01, 0.5)
    for log in (-3.0, 0.0, 0.7, 5.0):
        assert np.exp(law.log_likelihoods(every, np.array([log]))).sum() == pytest.approx(
            1, abs=2e-3
        )


def test_a_token_that_both_engines_agree_on_is_certain_at_small_scales():
    profile = token_profile([[0.0, 1.0, 2.0]], [0])[0]
    assert profile[0] == 0
    assert profile[SCALES.size] == pytest.approx(-math.log(3), rel=1e-3)
    assert profile[np.searchsorted(SCALES, 1.0)] == pytest.approx(
        -math.log(1 + math.exp(-1) + math.exp(-2)), rel=1e-3
    )


def test_noise_twice_as_large_is_the_next_scale():
    law = law_at(0.125)
    assert law.scaled(2).weights == pytest.approx(law_at(0.25).weights, abs=3e-5)
    between = law.scaled(math.sqrt(2))
    assert between.weights == pytest.approx(np.add(law.weights, law_at(0.25).weights) / 2, abs=3e-5)
    assert sum(law.scaled(1e9).weights) == pytest.approx(1)


def test_a_profile_is_stored_in_float16_and_its_end_is_kept():
    values = round_profiles([[-math.inf, -1e9, -1.0, 0.0]])
    assert values.tolist() == [[-60000.0, -60000.0, -1.0, 0.0]]
    assert np.array_equal(values, values.astype(np.float16))


@pytest.mark.parametrize(
    "weights", [(1.0,), (1.0, *[0.0] * (COLUMNS - 1)), (2.0, *[-1 / 27] * (COLUMNS - 1))]
)
def test_what_is_no_law_is_refused(weights: tuple[float, ...]):
    with pytest.raises(UsageError):
        TokenNoise(weights)
