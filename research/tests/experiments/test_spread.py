"""Spread of blocks, its noise band, and the part that random heads have in it."""

import numpy as np
import pytest
from assay_research.runs.spread import spread_of

from assay import stats


def test_equal_blocks_fall_inside_the_band_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = rng.binomial(3000, 0.59, size=(400, 3))
    found = [spread_of(row.tolist(), [3000] * 3) for row in draws]
    inside = sum(s.low <= s.value <= s.high for s in found)
    low, high = stats.proportion_interval(inside, 400, 0.999)
    assert low <= 0.95 <= high
    assert np.mean([s.p_value for s in found]) == pytest.approx(0.5, abs=0.06)


def test_the_published_spreads():
    """Seed tables: 1.1 points on 14 880 nonces a block is noise, 10.3 points is not."""
    sign_flips = spread_of([8645, 8764, 8809], [14880] * 3)
    assert sign_flips.value == pytest.approx(0.011, abs=2e-4)
    assert sign_flips.inside
    assert sign_flips.high == pytest.approx(0.0148, abs=2e-4)
    hooks = spread_of([9300, 9642, 8110], [14880] * 3, width=2048)
    assert not hooks.inside
    assert hooks.p_value < 1e-6


def test_a_head_widens_the_band_and_more_nonces_do_not_help():
    narrow, wide = spread_of([590, 600], [1000, 1000]), spread_of([590, 600], [1000, 1000], width=64)
    assert wide.high > narrow.high == wide.nonces_high
    assert wide.p_value > narrow.p_value
    many = spread_of([590_000, 600_000], [10**6] * 2, width=64)
    assert many.high > 5 * many.nonces_high
