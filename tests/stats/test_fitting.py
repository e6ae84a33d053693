import math

import numpy as np
import pytest

from assay.errors import UsageError
from assay.stats import SequentialTest
from assay.stats.noise_laws import RESOLUTION, fit_log_noise, fit_scale_noise

RNG = np.random.default_rng(11)


def test_the_scale_is_given_by_the_median():
    sample = RNG.standard_t(4, 4001) * 3e-5
    law, _ = fit_scale_noise(sample)
    assert float(law.survival(np.array([np.median(np.abs(sample))]))[0]) == pytest.approx(0.5)
    assert law.sigma == pytest.approx(3e-5, rel=0.1)


def test_identical_hardware_gives_the_resolution():
    law, _ = fit_scale_noise(np.zeros(32))
    assert law.sigma == RESOLUTION
    assert SequentialTest(law, effect=4.0).update(np.zeros(6)).verdict == "honest"


def test_log_noise_finds_location_and_spread():
    law, _ = fit_log_noise(np.exp(RNG.normal(math.log(0.07), 0.5, 4000)))
    assert law.mu == pytest.approx(math.log(0.07), abs=0.04)
    assert law.sd == pytest.approx(0.5, rel=0.1)


def test_log_noise_of_equal_vectors_rests_on_the_floor():
    law, _ = fit_log_noise(np.zeros(64), floor=1e-3)
    assert law.mu == pytest.approx(math.log(1e-3))
    assert SequentialTest(law, effect=4.0).update(np.zeros(4)).verdict == "honest"


@pytest.mark.parametrize("fit", [fit_scale_noise, fit_log_noise])
@pytest.mark.parametrize("bad", [[], [0.1] * 15, [0.1] * 20 + [math.nan], [0.1] * 20 + [math.inf]])
def test_refuses_samples_that_say_too_little(fit, bad):
    with pytest.raises(UsageError):
        fit(bad)


def test_refuses_a_distance_below_zero():
    with pytest.raises(UsageError):
        fit_log_noise(-np.ones(32))
