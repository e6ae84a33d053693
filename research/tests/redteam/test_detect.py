import numpy as np
import pytest
from assay_research.redteam.field import ALPHA, Judge, Pool, smallest

from assay.poc import Round, get_pipeline
from assay.stats.chord import chord_mean, chord_std

RNG = np.random.default_rng(0)
SIGMA = 1e-4
HONEST = SIGMA * RNG.standard_t(6, 2000)


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
    assert 10 * smallest(judge.sequential(int4)) <= judge.counting_needs(int4)


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
