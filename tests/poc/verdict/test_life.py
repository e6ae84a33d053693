"""The arithmetic of a node's whole life: tests that begin again, laws that change, and the bound
over all of them.
"""

import math
from dataclasses import replace

import numpy as np
import pytest

from assay.poc import Noise
from assay.poc.verdict import Life
from assay.poc.verdict.honest_noise import pack_scores
from assay.poc.verdict.life import EPOCH, error_share
from assay.poc.verdict.sample_plan import sequential_test
from assay.stats import LogNoise
from assay.stats.noise_laws import Spread
from tests.poc.verdict.ledgers import NOISE, OTHER, honest
from tests.usual import usual

PLAIN = Noise(LogNoise(-3.0, 0.5, 12), "vectors")


def test_the_shares_of_all_tests_sum_to_one():
    assert math.fsum(error_share(number) for number in range(1, 100_000)) == pytest.approx(
        1, abs=1e-5
    )


def test_a_young_life_is_one_test_at_its_share():
    values = [2 * x for x in honest(200)]
    life = Life(alpha=1e-3, beta=1e-2).update(NOISE, values[:150]).update(NOISE, values[150:])
    alone = sequential_test(NOISE).update(values).result
    found = life.evidence
    assert (found.n, found.tests) == (200, 1)
    assert found.log_e_max == pytest.approx(math.log(error_share(1)) + alone.log_e_max)
    assert found.log_evidence_honest == pytest.approx(
        math.log(error_share(1)) + alone.log_evidence_honest
    )


def test_an_honest_past_does_not_protect_a_cheat():
    """The first test alone would need thousands of nonces; one that began again needs a few."""
    life = Life(alpha=1e-3, beta=1e-2)
    first = sequential_test(NOISE)
    for seed in range(2 * EPOCH // 64):
        values = honest(64, seed)
        life.update(NOISE, values)
        first.update(values)
    assert life.evidence.verdict == "honest"
    for seed in range(100, 108):
        values = [1.4 * x for x in honest(64, seed)]
        life.update(NOISE, values, block=str(seed))
        first.update(values)
    assert life.evidence.verdict == "fraud"
    assert life.evidence.log_e_value > math.log(1e3)
    assert first.verdict != "fraud"
    for seed in range(108, 124):
        first.update([1.4 * x for x in honest(64, seed)])
    assert first.verdict != "fraud"


def test_laws_of_another_size_change_nothing_after_the_first_test():
    """Later tests took residuals in the unit of the first: in half of it, no cheat was seen."""
    lives = []
    for times in (1.0, 2.0):
        life = Life(alpha=1e-3, beta=1e-2)
        for number in range(12):
            factor = times if number >= 4 else 1.0
            cheat = 1.5 if number >= 8 else 1.0
            values = [factor * cheat * x for x in honest(256, number)]
            life.update(NOISE.scaled(factor), values, block=str(number))
        lives.append(life)
    for one, other in zip(lives[0].tests, lives[1].tests, strict=True):
        assert other.log_e == pytest.approx(one.log_e, rel=1e-3)
        assert lives[1].held(other) == pytest.approx(lives[0].held(one), rel=1e-3)
    assert [life.evidence.verdict for life in lives] == ["fraud", "fraud"]


def test_what_stands_of_a_test_that_has_ended_is_of_the_nonces_that_it_has_seen():
    """It went on with those of later pools, and every pool took longer than the one before."""
    life = Life(alpha=1e-3, beta=1e-2)
    for number in range(9):
        life.update(NOISE, [1.5 * x for x in honest(256, number)], block=str(number))
    ended = life.tests[1]
    assert 0 < life.held(ended) < ended.log_e
    stood = life.held(ended)
    for number in range(9, 18):
        life.update(NOISE, honest(256, number), block=str(number))
    assert life.held(ended) == pytest.approx(stood)
    assert ended.blocks.keys() == {"4", "5", "6", "7"}
    assert len(life.tests) == 5


def test_what_was_honest_long_ago_does_not_make_it_honest_now():
    life = Life(alpha=1e-3, beta=1e-2)
    for seed in range(2 * EPOCH // 64):
        life.update(NOISE, honest(64, seed))
    before = life.evidence
    for seed in range(3 * EPOCH // 64):
        life.update(NOISE, [1.5 * x for x in honest(64, seed)])
    assert before.verdict == "honest"
    assert before.log_evidence_honest > 10 > 0 > life.evidence.log_evidence_honest


def test_a_law_that_comes_back_continues_its_test():
    life = Life(alpha=1e-3, beta=1e-2)
    for seed in range(6):
        life.update(OTHER if seed % 2 else NOISE, honest(8, seed, OTHER if seed % 2 else NOISE))
    assert (life.evidence.tests, life.evidence.n) == (2, 48)


def test_a_missing_value_counts_as_the_worst_one():
    life = Life(alpha=1e-3, beta=1e-2)
    for block in ("one", "two"):
        life.update(NOISE, [math.nan] * 64, block=block)
    assert life.evidence.verdict == "fraud"


@pytest.mark.parametrize("every", [2, 8])
def test_cheating_in_some_blocks_alone_is_fraud(every):
    """Also where all blocks of the node's choice lie far apart, and longer ago than a pool."""
    life = Life(alpha=1e-3, beta=1e-2)
    for number in range(2 * every):
        factor = 8 if number % every == every - 1 else 1
        values = [factor * x for x in honest(64, number)]
        places = np.random.default_rng(number).permutation(1000)[:64]
        before = life.evidence.verdict
        life.update(NOISE, values, block=str(number), positions=places)
    assert before != "fraud"
    assert life.evidence.verdict == "fraud"


def test_the_share_that_is_not_excluded_only_falls():
    """Also where the node gets worse, or another law is taken: what was excluded once stays so."""
    life = Life(alpha=1e-3, beta=1e-2)
    shares = []
    for seed in range(60):
        noise = OTHER if seed % 3 == 2 else NOISE
        values = honest(16, seed, noise)
        life.update(noise, [3 * x for x in values] if 30 < seed < 33 else values, block=str(seed))
        shares.append(life.evidence.share)
    assert shares == sorted(shares, reverse=True)
    assert (shares[0], shares[-1]) == (0.2, 0.01)


def drawn(law: LogNoise, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Draws from a law by its survival function."""
    grid = np.exp(np.linspace(law.mu - 9 * law.sd, math.log(2.0), 20_000))
    return np.interp(-rng.uniform(size=shape), -law.survival(grid), grid)


@pytest.mark.parametrize("spread", usual([0.0, 0.2], 0.0))
def test_an_honest_life_is_accused_with_chance_alpha_at_most(spread, fewer):
    """With a spread, each life has a scale of its own, the same under both of its laws: their tests
    agree in error.
    """
    rng = np.random.default_rng(5)
    lives = 200 // fewer
    audits = 6
    alpha = 0.2
    noise = Noise(PLAIN.law, "one", Spread(spread))
    later = Noise(PLAIN.law, "another calibration", Spread(spread))
    scale_R = np.exp(spread * rng.standard_t(30, lives))
    values_RC = drawn(PLAIN.law, (lives, audits * 64), rng) * scale_R[:, None]
    verdicts = []
    for values_C in values_RC:
        life = Life(alpha=alpha, beta=0.01)
        for number, part in enumerate(np.split(values_C, audits)):
            life.update(later if number >= audits // 2 else noise, part)
        verdicts.append(life.evidence.verdict)
    accused = verdicts.count("fraud") / lives
    assert accused <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / lives)
    assert verdicts.count("honest") > lives / 2


def test_tests_of_one_law_share_their_bets_and_nothing_that_they_have_seen():
    scores = pack_scores(np.exp(np.random.default_rng(0).normal(-3.0, 0.5, 256)), PLAIN.law)
    priced = replace(PLAIN, scores=scores)
    first = sequential_test(priced)
    second = sequential_test(priced)
    before = second.prior.copy()
    first.update([1.0] * 64)
    assert (first.result.verdict, second.result.n, second.result.log_e_max) == ("fraud", 0, 0.0)
    assert first.prior is second.prior
    assert np.array_equal(second.prior, before)
    assert (
        second.update([PLAIN.size] * 64).result
        == sequential_test(priced).update([PLAIN.size] * 64).result
    )
