"""The fast lives of the search for cheats convict no earlier than those of the rule."""

import math

import numpy as np
import pytest
from assay_research import rational

from assay import stats
from assay.poc import Noise
from assay.poc.verdict import Life
from assay.stats.noise_laws import Spread

NOISE = Noise(stats.LogNoise(-3.2, 0.28), "an example", Spread(0.036))
AUDIT = 16


def of_rule(residuals, positions, blocks) -> float:
    """Return the audit at which a life is fraud; infinite for never."""
    life = Life(alpha=rational.ALPHA, beta=rational.BETA)
    for start in range(0, len(residuals), AUDIT):
        part = slice(start, start + AUDIT)
        life.update(
            NOISE,
            residuals[part],
            block=str(blocks[start]),
            positions=positions[part].tolist(),
            batch_size=rational.BATCH,
        )
        if life.evidence.verdict == "fraud":
            return start // AUDIT + 1
    return math.inf


@pytest.mark.parametrize(
    ("share", "times", "at"),
    [(0.0, 5.0, None), (0.05, 5.0, None), (0.5, 5.0, 8), (0.3, 30.0, None)],
)
def test_a_fast_life_convicts_no_earlier_than_a_life_and_within_a_look(share, times, at):
    rng = np.random.default_rng(round(100 * share))
    count = 40 * AUDIT
    positions = np.arange(count) * 7
    cheap = positions % 16 < at if at else rng.random(count) < share
    honest = rational.draw_sizes(NOISE.law, count, rng)
    residuals = np.minimum(np.where(cheap, times * honest, honest), 2.0)
    blocks = np.arange(count) // AUDIT
    fast = rational.run_life(NOISE, residuals, positions, blocks, cheap)
    exact = of_rule(residuals, positions, blocks)
    assert exact <= fast.convicted <= exact + rational.LOOKS
    assert (fast.convicted < math.inf) == (share > 0 and at is None)
    assert fast.paid_cheap == 0


def test_what_a_strategy_is_paid_is_what_it_computed_cheaply_and_is_credited():
    rng = np.random.default_rng(0)
    for way, more in (("anywhere", ()), ("places", (8, 16)), ("one block", (1,))):
        strategy = rational.Strategy(way, 0.01 if way != "places" else 0.5, 5.0, more)
        result = rational.live(strategy, NOISE, rng, audits=20)
        (paid,) = rational.paid_share(strategy, [result])
        assert 0 <= paid <= result.cheap / result.nonces
        assert (paid == 0) == (way == "places")
