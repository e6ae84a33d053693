"""Bets that honest residuals price themselves: fair whatever the tail, and hardly weaker where the
law is right.
"""

import math

import numpy as np
import pytest

from assay.stats import LogNoise, SequentialTest
from assay.stats.e_values import grid_of_multiples
from assay.stats.fair_bets import fair_bets
from assay.stats.noise_laws import Spread, fit_log_noise

NARROW = LogNoise(-3.2, 0.28)  # as wide as the law of tokens-1


def drawn(shape, rng, large=0.0, cheap=0.0):
    """Residuals of the narrow law, of which some are ten times as large, and some five times."""
    grid = np.geomspace(NARROW.size * 1e-4, NARROW.size * 1e6, 4001)
    sizes = np.interp(rng.random(shape), 1 - NARROW.survival(grid), grid)
    sizes *= np.where(rng.random(shape) < large, 10.0, 1.0) * np.where(
        rng.random(shape) < cheap, 5.0, 1.0
    )
    return np.minimum(sizes, 2.0)


def test_a_bet_wins_nothing_from_the_residuals_that_price_it():
    honest = drawn(1024, np.random.default_rng(0), large=0.02)
    law, _ = fit_log_noise(honest)
    size = law.magnitudes(honest)
    multiples = grid_of_multiples(1.5, law.junk_multiple, [5.0])
    for multiple, cap, price in zip(multiples, *fair_bets(law, honest, multiples), strict=True):
        ratio = np.exp(law.log_density(size, float(multiple)) - law.log_density(size, 1.0))
        assert ratio.mean() > 1, "the law alone would be no fair bet"
        assert np.append(np.minimum(ratio, cap), cap).mean() <= price * (1 + 1e-9), (
            "a new one is like any of these"
        )


@pytest.mark.parametrize(("large", "least"), [(0.02, 0.7), (0.0, 0.95)])
def test_a_tail_that_the_law_does_not_have_accuses_nobody_and_cheats_are_caught(large, least):
    rng = np.random.default_rng(0)
    honest = drawn(1024, rng, large)
    law, error = fit_log_noise(honest)
    arguments = {"spread": Spread(math.hypot(error, 0.03)), "effect": 2.0}
    priced = SequentialTest(law, honest=honest, **arguments)
    audits = drawn((300, 64), rng, large)
    cheats = drawn((100, 150), rng, large, cheap=0.1)
    assert priced.accusations(audits)[:, -1].mean() < 0.01
    assert priced.accusations(cheats)[:, -1].mean() >= least
    if large:
        assert SequentialTest(law, **arguments).accusations(audits)[:, -1].mean() > 0.02


def test_bets_on_a_share_are_priced_by_the_widest_pair():
    rng = np.random.default_rng(1)
    honest = drawn(1024, rng)
    widest = drawn(1024, rng, large=0.03)
    law = fit_log_noise(honest)[0]
    audits = drawn((200, 64), rng, large=0.03)
    accused = [
        SequentialTest(law, effect=2.0, honest=honest, **more).accusations(audits)[:, -1].mean()
        for more in ({}, {"widest": widest})
    ]
    assert accused[1] < 0.05 < accused[0]
