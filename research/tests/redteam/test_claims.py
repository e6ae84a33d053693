import numpy as np
import pytest
from assay_research.redteam.run import screened

from assay import stats


def test_a_perfect_look_finds_all_valid_nonces_for_its_own_cost():
    kept, cost = screened(np.zeros(10), 0.25, 1.404)
    assert kept == 1.0
    assert cost == pytest.approx(0.25 + stats.valid_rate(1.404, 8192), abs=0.005)


def test_a_blind_look_saves_nothing():
    blind = np.random.default_rng(0).normal(0, 1.0, 10_000)
    kept, cost = screened(blind, 0.25, 1.404)
    assert kept == pytest.approx(0.5, abs=0.02)
    assert cost > 1
