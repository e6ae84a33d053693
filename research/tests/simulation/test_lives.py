"""Many lives at once are the lives that the ledger keeps, and what is drawn for them follows the laws."""

import numpy as np
import pytest
from assay_research.simulation import Grid, Kind, Machines, ManyLives, convicted_in

from assay.poc import Noise
from assay.poc.verdict import Life
from assay.poc.verdict.life import EPOCH
from assay.stats import LogNoise, ScaleNoise
from assay.stats.noise import Spread

SPREAD = Spread(0.05)
VECTORS = Noise(LogNoise(-3.5, 0.6, 12), "vectors", SPREAD)
DISTANCES = Noise(ScaleNoise(2e-4), "distances", SPREAD)
PLAIN = Noise(LogNoise(-3.5, 0.6, 12), "vectors")
KINDS = (
    Kind("honest"),
    Kind("a little noisier", multiple=1.25),
    Kind("late", multiple=1.6, honest_for=0.4),
    Kind("partly", multiple=10.0, share=0.02),
    Kind("junk", junk=0.004),
)


@pytest.mark.parametrize("noise", [VECTORS, DISTANCES, PLAIN], ids=["vectors", "distances", "known scale"])
def test_many_lives_are_the_lives_of_the_ledger(noise):
    """Every node, after every round: the same residuals convict it there and here."""
    nodes, rounds, nonces, alpha = 10, 24, 100, 0.05
    grid, rng = Grid(noise.law), np.random.default_rng(3)
    convicted = 0
    for kind in KINDS:
        many = ManyLives(noise, grid.sizes_A, nodes=nodes, alpha=alpha)
        lives = [Life(alpha=alpha, beta=0.01) for _ in range(nodes)]
        log_scale_N = 0.05 * rng.standard_normal(nodes)
        for round in range(rounds):
            now = kind if round >= kind.honest_for * rounds else Kind("honest")
            places_NC = grid.draw(now, log_scale_N, nonces, rng)
            many.update(places_NC)
            for life, places_C in zip(lives, places_NC, strict=True):
                life.update(noise, grid.sizes_A[places_C])
            found = [life.evidence.log_e_max >= -np.log(alpha) for life in lives]  # all of it is one block
            assert many.convicted_N.tolist() == found, (kind.name, round)
        convicted += int(many.convicted_N.sum())
    assert rounds * nonces > 2 * EPOCH
    assert nodes < convicted < len(KINDS) * nodes
    assert {life.evidence.tests for life in lives} == {3}


def test_late_cheats_are_caught_when_they_begin_and_draws_do_not_depend_on_the_number_of_cores(monkeypatch):
    kind = Kind("late", multiple=17.0, honest_for=0.5)

    def caught() -> np.ndarray:
        machines = Machines(SPREAD, 0.02)
        return convicted_in(kind, VECTORS, machines, nodes=700, rounds=20, nonces=16, alpha=1e-3, seed=(1, 2))

    first = caught()
    assert np.median(first) == 11
    assert first.max() <= 13
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert np.array_equal(caught(), first)
