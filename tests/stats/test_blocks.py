"""The law of a block: against simulated states, its quantiles, and what is refused."""

import math

import numpy as np
import pytest

from assay.errors import UsageError
from assay.stats import BlockLaw, chord_cdf, r_target_for, valid_rate

D = 8192


def shares(width: int, largest: float) -> np.ndarray:
    """Energy per coordinate as trained states have it: one large share, the others falling like
    1/i.
    """
    rest = 1 / np.arange(3, width + 2)
    return np.concatenate([[largest], (1 - largest) * rest / rest.sum()])


def factors(shares_D: np.ndarray, blocks: int, seed: int = 0) -> np.ndarray:
    """γ of many blocks: the length of a normal vector under the shares."""
    return np.sqrt(np.random.default_rng(seed).normal(size=(blocks, len(shares_D))) ** 2 @ shares_D)


@pytest.mark.parametrize(("width", "largest"), [(48, 0.02), (256, 0.13), (256, 0.2)])
def test_the_factor_of_a_block_has_the_stated_law(width: int, largest: float):
    p_D = shares(width, largest)
    law = BlockLaw(dimension=D, freedom=1 / float((p_D**2).sum()))
    drawn = factors(p_D, 20_000)
    assert (drawn**2).std() == pytest.approx(math.sqrt(2 / law.freedom), rel=0.05)
    assert drawn.std() == pytest.approx(law.factor_error, rel=0.15)
    low = law.factor(0.025)
    high = law.factor(0.975)
    assert np.mean((drawn < low) | (drawn > high)) == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.5905])
def test_rates_over_blocks(rate: float):
    p_D = shares(256, 0.13)
    law = BlockLaw(dimension=D, freedom=1 / float((p_D**2).sum()))
    r = r_target_for(rate, D)
    cosine = 1 - r**2 / 2
    rates = chord_cdf(np.sqrt(2 - 2 * cosine / factors(p_D, 20_000)), D)
    assert law.valid_rate(r) == pytest.approx(rates.mean(), abs=6e-4)
    assert law.rate_error(r) == pytest.approx(rates.std(), rel=0.18, abs=1e-4)
    low, high = law.rate_interval(r)
    assert np.mean((rates < low) | (rates > high)) == pytest.approx(0.05, abs=0.02) or rate == 0.5
    assert abs(law.valid_rate(r) - rate) < 0.005  # the average over blocks is nearly the chord law


def test_the_rate_of_nonces_adds_up_with_that_of_the_block():
    rng = np.random.default_rng(3)
    r = r_target_for(0.1, D)
    law = BlockLaw(dimension=D, freedom=25)
    gamma = np.sqrt(rng.chisquare(25, 4000) / 25)
    rates = rng.binomial(400, chord_cdf(np.sqrt(2 - 2 * (1 - r**2 / 2) / gamma), D)) / 400
    assert law.rate_error(r, 400) == pytest.approx(rates.std(), rel=0.05)
    assert law.rate_error(r) < law.rate_error(r, 400)


def test_a_known_factor_is_a_chord_law():
    law = BlockLaw(dimension=D, freedom=math.inf)
    x = np.linspace(1.38, 1.45, 7)
    assert [law.valid_rate(r) for r in x] == pytest.approx(chord_cdf(x, D), abs=1e-12)
    assert law.valid_rate(1.416) == pytest.approx(valid_rate(1.416, D), abs=1e-12)
    assert law.rate_error(1.416) == 0.0
    assert law.target_interval(1.404) == pytest.approx((1.404, 1.404))
    shares, errors = law.bins(x)
    assert shares == pytest.approx(np.diff(chord_cdf(x, D)), abs=1e-12)
    assert not errors.any()
    wide = BlockLaw(dimension=D, freedom=math.inf, scale=1.5)
    assert wide.valid_rate(r_target_for(0.1, D)) == pytest.approx(0.196, abs=0.002)
    assert wide.valid_rate(1.9999) == pytest.approx(1.0)


def test_the_quantile_of_a_block():
    law = BlockLaw(dimension=D, freedom=25)
    r = r_target_for(0.1, D)
    low, high = law.target_interval(r, 0.9)
    assert low < r < high
    assert 1 - low**2 / 2 == pytest.approx((1 - r**2 / 2) * law.factor(0.95))
    low, high = law.target_interval(math.sqrt(2))
    assert high - low < 1e-12  # at one half no factor matters


@pytest.mark.parametrize(
    "wrong", [{"freedom": 0}, {"freedom": math.nan}, {"freedom": 5, "scale": 0}]
)
def test_laws_that_cannot_be_are_refused(wrong):
    with pytest.raises(UsageError):
        BlockLaw(dimension=D, **wrong)
    with pytest.raises(UsageError):
        BlockLaw(dimension=D, freedom=5).valid_rate(2.5)


def test_no_nonces_have_no_error():
    law = BlockLaw(dimension=8192, freedom=24.0)
    with pytest.raises(UsageError):
        law.rate_error(1.404, 0)
