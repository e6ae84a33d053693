import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate

from assay.errors import UsageError
from assay.stats import LogNoise, ScaleNoise
from assay.stats.noise_laws import GROSS_PROBABILITY, RESOLUTION

SCALE = ScaleNoise(1e-4)
LOG = LogNoise(math.log(0.07), 0.5)


@pytest.mark.parametrize("multiple", [1.0, 4.0, 50.0])
def test_densities_have_unit_mass(multiple):
    def scale(e):
        return 2 * math.exp(SCALE.log_density(np.array([e]), multiple)[0])

    def log(x):
        return math.exp(LOG.log_density(np.array([math.exp(x)]), multiple)[0])

    mode = LOG.mu + math.log(multiple)
    near = [mode - 1, mode, mode + 1]
    assert integrate.quad(scale, 0, 400 * multiple * SCALE.sigma, limit=400)[0] == pytest.approx(
        1, abs=1e-6
    )
    assert integrate.quad(log, mode - 30, mode + 30, points=near, limit=400)[0] == pytest.approx(
        1, abs=1e-6
    )


@given(st.lists(st.floats(0, 2), min_size=2, max_size=2), st.sampled_from([2.0, 4.0, 20.0]))
def test_a_larger_residual_is_never_evidence_for_the_node(pair, multiple):
    for law in (SCALE, LOG):
        size = law.magnitudes(sorted(pair))
        ratio = law.log_density(size, multiple) - law.log_density(size, 1.0)
        assert ratio[0] <= ratio[1] + 1e-9


@pytest.mark.parametrize(
    "law", [SCALE, LOG, ScaleNoise(1e-5, dof=3), LogNoise(-3.0, 0.3, tail=1.2)]
)
def test_gross_threshold_is_the_stated_quantile(law):
    assert law.survival(np.array([law.gross_threshold]))[0] == pytest.approx(
        GROSS_PROBABILITY, rel=1e-6
    )


def test_the_widest_law_of_a_file_has_a_gross_threshold():
    assert math.isfinite(LogNoise(-3.0, 100.0, tail=1e-3).gross_threshold)


def test_non_finite_values_become_the_largest_residual():
    bad = [math.nan, math.inf, -math.inf, -5.0]
    assert SCALE.magnitudes(bad).tolist() == [2.0] * 4
    assert LOG.magnitudes([math.nan, math.inf, 5.0, 0.0]).tolist() == [2.0, 2.0, 2.0, LOG.floor]
    with pytest.raises(UsageError):
        LOG.magnitudes([0.2, -0.1])


@pytest.mark.parametrize(
    ("law", "arguments"),
    [
        (ScaleNoise, {"sigma": 0.0}),
        (ScaleNoise, {"sigma": RESOLUTION / 2}),
        (ScaleNoise, {"sigma": math.nan}),
        (ScaleNoise, {"sigma": 1e-4, "dof": 0}),
        (ScaleNoise, {"sigma": 1e-4, "junk_sigma": math.inf}),
        (LogNoise, {"mu": math.nan, "sd": 1.0}),
        (LogNoise, {"mu": 0.0, "sd": 0.0}),
        (LogNoise, {"mu": 0.0, "sd": 1.0, "dimension": 1}),
        (LogNoise, {"mu": 0.0, "sd": 1.0, "tail": 0.0}),
        (LogNoise, {"mu": 0.0, "sd": 1.0, "floor": 3.0}),
    ],
)
def test_refuses_parameters_out_of_range(law, arguments):
    with pytest.raises(UsageError):
        law(**arguments)
