import math

import numpy as np
import pytest
from scipy import optimize, stats

from assay.errors import UsageError
from assay.stats import SequentialTest
from assay.stats.noise import RESOLUTION, Spread, fit_log_noise, fit_scale_noise

RNG = np.random.default_rng(11)


def test_scale_is_the_likeliest_one_or_more():
    sample = RNG.standard_t(6, 400) * 3e-5
    found = optimize.minimize_scalar(
        lambda s: -stats.t.logpdf(sample, 6, scale=math.exp(s)).sum(), bounds=(-13, -8), options={"xatol": 1e-9}
    )
    assert 1 - 1e-5 < fit_scale_noise(sample, dof=6).law.sigma / math.exp(found.x) < 1.3
    assert fit_scale_noise(np.clip(sample, -3e-5, 3e-5), dof=2).law.sigma < math.exp(found.x)


def test_the_tail_is_chosen_by_the_data():
    heavy, light = RNG.standard_t(2.5, 4000), RNG.standard_t(30, 4000)
    assert fit_scale_noise(heavy * 1e-5).law.dof <= 3
    assert fit_scale_noise(light * 1e-5).law.dof == 6, "a tail lighter than the lightest is not offered"
    flips = np.where(RNG.random(4000) < 0.1, RNG.exponential(1.0, 4000), 0.0)
    assert fit_log_noise(np.exp(RNG.normal(-3, 0.3, 4000) + flips)).law.tail <= 1.0
    assert fit_log_noise(np.exp(RNG.normal(-3, 0.3, 4000))).law.tail >= 2.0


def test_identical_hardware_gives_the_resolution():
    fit = fit_scale_noise(np.zeros(32))
    assert fit.law.sigma == RESOLUTION
    assert SequentialTest(fit.law, effect=4.0).update(np.zeros(6)).verdict == "honest"


def test_one_large_value_hardly_moves_the_scale():
    sample = RNG.standard_t(6, 500) * 2e-5
    before, after = fit_scale_noise(sample), fit_scale_noise(np.append(sample, 5e-3))
    assert after.law.sigma < 1.05 * before.law.sigma


def test_log_noise_finds_location_and_spread():
    fit = fit_log_noise(np.exp(RNG.normal(math.log(0.07), 0.5, 4000)))
    assert fit.law.mu == pytest.approx(math.log(0.07), abs=0.04)
    assert fit.law.sd == pytest.approx(0.5, rel=0.1)


def test_log_noise_of_equal_vectors_rests_on_the_floor():
    fit = fit_log_noise(np.zeros(64), floor=1e-3)
    assert fit.law.mu == pytest.approx(math.log(1e-3))
    assert SequentialTest(fit.law, effect=4.0).update(np.zeros(4)).verdict == "honest"


@pytest.mark.parametrize("fit", [fit_scale_noise, fit_log_noise])
@pytest.mark.parametrize("bad", [[], [0.1] * 15, [0.1] * 20 + [math.nan], [0.1] * 20 + [math.inf]])
def test_refuses_samples_that_say_too_little(fit, bad):
    with pytest.raises(UsageError, match="finite"):
        fit(bad)


def test_refuses_parameters_out_of_range():
    with pytest.raises(UsageError, match="degrees"):
        fit_scale_noise(np.ones(32), dof=-1)
    with pytest.raises(UsageError, match="distance"):
        fit_log_noise(-np.ones(32))


def test_false_accusations_stay_bounded_when_the_law_is_itself_measured(fewer):
    accused, repeats = 0, 400 // fewer
    for _ in range(repeats):
        fit = fit_scale_noise(RNG.standard_t(6, 64) * 2e-5)
        test = SequentialTest(fit.law, spread=Spread(fit.error), effect=4.0, alpha=0.01)
        accused += test.update(RNG.standard_t(6, 200) * 2e-5).verdict == "fraud"
    assert accused <= repeats * 0.01 + 3 * math.sqrt(repeats * 0.01)
