import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from assay.errors import UsageError
from assay.stats import chord_cdf, r_target_for, valid_rate
from assay.stats.chord import chord_mean, chord_std, rate_standard_error


@pytest.mark.parametrize(
    ("r_target", "percent"), [(1.416, 59.05), (1.404, 9.64), (1.405, 12.0), (1.407, 17.9)]
)
def test_known_rates_at_8192_dimensions(r_target, percent):
    assert valid_rate(r_target, 8192) * 100 == pytest.approx(percent, abs=0.05)


@pytest.mark.parametrize("d", [3, 5, 12, 64, 99, 101, 102, 512, 8192])
def test_moments_agree_with_quadrature_of_the_density(d):
    centre = math.sqrt(2)
    width = 40 / math.sqrt(2 * d)
    low = max(0.0, centre - width)
    high = min(2.0, centre + width)

    def density(x):
        return float(stats.beta.pdf((x / 2) ** 2, (d - 1) / 2, (d - 1) / 2)) * x / 2

    def integral(power):
        return integrate.quad(lambda x: (x - centre) ** power * density(x), low, high, limit=400)[0]

    shift = integral(1)
    assert integral(0) == pytest.approx(1, abs=1e-9)
    assert chord_mean(d) == pytest.approx(centre + shift, abs=1e-10)
    assert chord_std(d) == pytest.approx(math.sqrt(integral(2) - shift**2), rel=1e-7)


def test_in_two_dimensions_it_is_the_chord_of_a_uniform_angle():
    x = np.linspace(0.1, 1.9, 19)
    np.testing.assert_allclose(chord_cdf(x, 2), 2 * np.arcsin(x / 2) / np.pi, atol=1e-12)
    assert chord_mean(2) == pytest.approx(4 / np.pi, abs=1e-12)


@pytest.mark.parametrize("d", [12, 64])
def test_random_directions_follow_the_law(d):
    rng = np.random.default_rng(d)
    directions = rng.standard_normal((20_000, d))
    cosines = directions[:, 0] / np.linalg.norm(directions, axis=1)
    distances = np.sqrt(2 - 2 * cosines)
    for r in (1.2, 1.4, 1.5):
        rate = valid_rate(r, d)
        assert abs(np.mean(distances < r) - rate) < 4 * rate_standard_error(rate, distances.size)


@given(rate=st.floats(1e-6, 1 - 1e-6), d=st.integers(2, 20_000))
def test_r_target_inverts_the_rate(rate, d):
    assert valid_rate(r_target_for(rate, d), d) == pytest.approx(rate, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize(
    ("function", "values", "field"),
    [
        (lambda bad: valid_rate(bad, 8192), (0.0, -1.0, 2.0001, math.nan, math.inf), "r_target"),
        (lambda bad: r_target_for(bad, 8192), (0.0, -0.1, 1.1, math.nan), "rate"),
        (chord_mean, (1,), "d"),
        (chord_std, (1,), "d"),
        (lambda bad: valid_rate(1.4, bad), (1,), "d"),
    ],
)
def test_what_is_out_of_range_is_named(function, values, field):
    for bad in values:
        with pytest.raises(UsageError) as refusal:
            function(bad)
        assert refusal.value.field == field


def test_standard_error_of_a_block_mean():
    assert rate_standard_error(0.59, 14_880) * 100 == pytest.approx(0.403, abs=0.001)
    with pytest.raises(UsageError):
        rate_standard_error(0.5, 0)
