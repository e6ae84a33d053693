"""What attackers cost and claim, and the rules that catch them."""

import numpy as np
import pytest
import torch
from assay_research.redteam.attacks import ATTACKS
from assay_research.redteam.field import ALPHA, CHECKED, POWER, Judge, Pool, best_test
from assay_research.redteam.run import screened
from assay_research.runs.spread import first_reached
from scipy.stats import norm

from assay import stats
from assay.poc import Round, get_pipeline
from assay.poc.protocol.transforms import Reading
from assay.stats.chord import chord_mean, chord_std

RNG = np.random.default_rng(0)
SIGMA = 1e-4
HONEST = SIGMA * RNG.standard_t(6, 2000)
RUNS = [
    (attack, dtype) for attack in ATTACKS for dtype in ("float32", "float8") if attack.serves(dtype)
]
# 64 positions are more than there are here, and a CPU has no short sums.
HONEST_HERE = ("sliding window of 64", "short sums")


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(get_pipeline("poc-2.0"), HONEST)


@pytest.fixture(scope="module")
def vectors() -> Judge:
    return Judge(get_pipeline("hardened"), np.exp(RNG.normal(-4, 0.4, 2000)))


def test_honest_residuals_are_accused_at_the_stated_rate_at_most(judge, vectors):
    pool = Pool(((1.0, SIGMA * RNG.standard_t(6, 5000)),))
    assert judge.sequential(pool)[-1] <= ALPHA
    assert judge.counting(pool)[-1] <= 3 * ALPHA
    assert judge.counting_needs(Pool(((1.0, HONEST / 2),))) is None
    same = Pool(((1.0, np.exp(RNG.normal(-4, 0.4, 5000))),))
    assert vectors.sequential(same)[-1] <= ALPHA


def test_the_sequential_test_needs_a_tenth_of_the_count(judge):
    int4 = Pool(((1.0, 20 * HONEST),))
    assert 10 * first_reached(CHECKED, judge.sequential(int4), POWER) <= judge.counting_needs(int4)


def test_the_mismatch_rate_is_that_of_simulated_flips(judge):
    residuals = 10 * HONEST
    recomputed = RNG.normal(chord_mean(8192), chord_std(8192), 2_000_000)
    received = recomputed + RNG.choice(residuals, recomputed.size)
    claimed = received < Round.r_target
    flips = (recomputed[claimed] > Round.r_target).mean()
    assert judge.mismatch_rate(residuals) == pytest.approx(flips, rel=0.05)


def test_the_published_constants_accuse_honest_vectors_of_bfloat16_size(vectors):
    drawn = np.exp(RNG.normal(-4, 0.4, (200, 64)))
    assert vectors.published(drawn) > 0.9
    assert vectors.accused(drawn) <= 0.01


def test_a_perfect_look_finds_all_valid_nonces_for_its_own_cost():
    kept, cost = screened(np.zeros(10), 0.25, 1.404)
    assert kept == 1.0
    assert cost == pytest.approx(0.25 + stats.valid_rate(1.404, 8192), abs=0.005)


def test_a_blind_look_saves_nothing():
    blind = np.random.default_rng(0).normal(0, 1.0, 10_000)
    kept, cost = screened(blind, 0.25, 1.404)
    assert kept == pytest.approx(0.5, abs=0.02)
    assert cost > 1


@pytest.mark.parametrize(
    ("attack", "dtype"), RUNS, ids=[f"{attack.name}-{dtype}" for attack, dtype in RUNS]
)
def test_every_attacker_runs_and_says_what_it_costs(attack, dtype, scene, float8_scene, inputs_btd):
    scene = scene if dtype == "float32" else float8_scene
    inputs_btd = inputs_btd.to(scene.model.dtype)
    program = attack.make(scene)
    every = Reading(torch.ones(inputs_btd.shape[:2]))
    read = program.read(inputs_btd, every)
    assert read.shape == (4, 64)
    assert torch.isfinite(read).all()
    assert 0 <= program.cost <= 1
    honest = scene.engine(scene.model).read(inputs_btd, every)
    if attack.name not in HONEST_HERE:
        assert not torch.equal(read, honest), "it is not the honest result"
    assert attack.skips or attack.family in ("weights", "none")
    if not attack.last_unknown:
        assert torch.isfinite(program.read(inputs_btd, None)).all()


def test_fewer_bits_save_over_the_format_that_honest_provers_have(scene, float8_scene):
    made = {attack.name: attack.make for attack in ATTACKS}
    costs = {
        name: [made[f"{name} weights"](where).cost for where in (scene, float8_scene)]
        for name in ("int8", "int4")
    }
    assert costs == {"int8": [0.5, 1.0], "int4": [0.25, 0.5]}


def test_the_best_test_of_known_laws_needs_what_two_normal_laws_need():
    rng = np.random.default_rng(0)
    known, other, far = (np.exp(rng.normal(mean, 1, 4000)) for mean in (0, 1, 9))
    needed = (norm.isf(ALPHA) + norm.isf(1 - POWER)) ** 2  # for a shift of one standard deviation
    assert abs(best_test(known, other) - needed) < 0.2 * needed
    assert best_test(known, far) == 1
    assert best_test(known, np.ones(8)) is None
