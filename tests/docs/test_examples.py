"""The examples in the docstrings of public functions run and print what they say."""

import doctest
from operator import attrgetter

import pytest

import assay.poc.responses
import assay.vhack.directions.checks
import assay.vhack.pairs
from tests.usual import enough

NAMES = (
    "models.load_model",
    *(f"poc.{name}" for name in ("Round", "prove", "verify", "calibrate", "Build", "NetworkPins")),
    *("poc.measure_r_target", "poc.measure_block_factor", "streams.step_seeds"),
    *(f"poc.responses.{name}" for name in ("respond", "Sampling", "ResponseSeed")),
    *(
        f"vhack.{name}"
        for name in (
            "Basis",
            "extract",
            "per_sample_gradients",
            "checks.check",
            "pairs.generate_pairs",
        )
    ),
)
LONG = "vhack.checks.check"  # docs/vhack-checks.md has the same call, with fewer pairs in its test


@pytest.mark.parametrize("name", enough(NAMES, *(name for name in NAMES if name != LONG)))
def test_examples(name):
    function = attrgetter(name)(assay)
    examples = [
        found
        for found in doctest.DocTestFinder(recurse=False).find(function, name)
        if found.examples
    ]
    assert examples, f"help(assay.{name}) has no example"
    for found in examples:
        assert doctest.DocTestRunner(verbose=False).run(found).failed == 0
