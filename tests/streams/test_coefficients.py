"""Where the polynomials come from: Chebyshev fits with 60 digits, made again here, and how far off
they are.
"""

import mpmath
import numpy as np
import pytest

from assay.streams import definition

mpmath.mp.dps = 60
EIGHTH_TURN = [mpmath.mpf(0), mpmath.mpf(1) / 4]


def ln_tail(f):
    return (mpmath.log(1 + f) - f + f * f / 2) / f**3


def sin_tail(x):
    d = mpmath.sqrt(x)
    return 2 - mpmath.sin(mpmath.pi * d / 2) / d


def cos_tail(x):
    return (1 - mpmath.cos(mpmath.pi * mpmath.sqrt(x) / 2)) / x


CASES = {
    # name: function, interval, coefficients, relative effect on the result of an error of 1 in the
    # polynomial
    "ln": (
        ln_tail,
        [mpmath.sqrt(0.5) - 1, mpmath.sqrt(2) - 1],
        definition.LN_POLY,
        lambda f: f**3 / mpmath.log(1 + f),
    ),
    "sin": (
        sin_tail,
        EIGHTH_TURN,
        definition.SIN_POLY,
        lambda x: mpmath.sqrt(x) / mpmath.sin(mpmath.pi * mpmath.sqrt(x) / 2),
    ),
    "cos": (
        cos_tail,
        EIGHTH_TURN,
        definition.COS_POLY,
        lambda x: x / mpmath.cos(mpmath.pi * mpmath.sqrt(x) / 2),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_coefficients_are_the_rounded_fit(name):
    function, interval, coefficients, _ = CASES[name]
    fitted = mpmath.chebyfit(function, interval, len(coefficients))
    assert [np.float32(float(c)) for c in fitted] == list(coefficients)


@pytest.mark.parametrize("name", CASES)
def test_error_of_the_polynomial_is_far_below_an_ulp(name):
    function, (low, high), coefficients, effect = CASES[name]
    points = [low + (high - low) * (2 * i + 1) / 1002 for i in range(501)]
    exact = [mpmath.mpf(float(c)) for c in coefficients]
    errors = [abs((mpmath.polyval(exact, x) - function(x)) * effect(x)) for x in points]
    assert max(errors) < mpmath.mpf(2) ** -26


def test_ln2_in_two_parts():
    high, low = (mpmath.mpf(float(part)) for part in (definition.LN2_HIGH, definition.LN2_LOW))
    assert abs(high + low - mpmath.log(2)) < mpmath.mpf(2) ** -36
    assert all(
        np.float32(k) * definition.LN2_HIGH == k * float(definition.LN2_HIGH) for k in range(-5, 35)
    )
