import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate

from assay.errors import UsageError
from assay.stats import LogNoise, ScaleNoise
from assay.stats.noise import GROSS_PROBABILITY, JUNK_SIGMA, RESOLUTION

SCALE = ScaleNoise(1e-4)
LOG = LogNoise(math.log(0.07), 0.5)


@pytest.mark.parametrize("multiple", [1.0, 4.0, 50.0])
def test_scale_densities_have_unit_mass(multiple):
    width = multiple * SCALE.sigma
    mass, _ = integrate.quad(
        lambda e: math.exp(SCALE.log_density(np.array([e]), multiple)[0]), 0, 400 * width, limit=400
    )
    assert 2 * mass == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("multiple", [1.0, 4.0, 20.0])
def test_log_densities_have_unit_mass(multiple):
    mode = LOG.mu + math.log(multiple)
    ends = (mode - 30, mode + 30)
    mass, _ = integrate.quad(
        lambda x: math.exp(LOG.log_density(np.array([math.exp(x)]), multiple)[0]),
        *ends,
        points=[mode - 1, mode, mode + 1],
        limit=400,
    )
    assert mass == pytest.approx(1, abs=1e-6)


@given(st.lists(st.floats(0, 2), min_size=2, max_size=2), st.sampled_from([2.0, 4.0, 20.0]))
def test_a_larger_residual_is_never_evidence_for_the_node(pair, multiple):
    for law in (SCALE, LOG):
        size = law.magnitudes(sorted(pair))
        ratio = law.log_density(size, multiple) - law.log_density(size, 1.0)
        assert ratio[0] <= ratio[1] + 1e-9


@pytest.mark.parametrize("law", [SCALE, LOG, ScaleNoise(1e-5, dof=3), LogNoise(-3.0, 0.3, tail=1.2)])
def test_gross_threshold_is_the_stated_quantile(law):
    assert law.survival(np.array([law.gross_threshold]))[0] == pytest.approx(GROSS_PROBABILITY, rel=1e-6)


def test_invented_distances_are_gross_as_often_as_stated():
    rng = np.random.default_rng(0)
    law = ScaleNoise(4e-4)
    share = np.mean(np.abs(rng.normal(0, JUNK_SIGMA, 40_000)) > law.gross_threshold)
    assert share == pytest.approx(law.junk_detection, abs=0.012)


def test_invented_vectors_are_gross_as_often_as_stated():
    rng = np.random.default_rng(0)
    law = LogNoise(math.log(0.12), 0.5)
    vectors = rng.standard_normal((2, 20_000, 12))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    share = np.mean(np.linalg.norm(vectors[0] - vectors[1], axis=-1) > law.gross_threshold)
    assert 0.1 < law.junk_detection < 0.9
    assert share == pytest.approx(law.junk_detection, abs=0.015)


def test_non_finite_values_become_the_largest_residual():
    bad = [math.nan, math.inf, -math.inf, -5.0]
    assert SCALE.magnitudes(bad).tolist() == [2.0] * 4
    assert LOG.magnitudes([math.nan, math.inf, 5.0, 0.0]).tolist() == [2.0, 2.0, 2.0, LOG.floor]


def test_refuses_a_negative_distance():
    with pytest.raises(UsageError, match="distance -"):
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
