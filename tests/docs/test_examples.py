"""The examples in the docstrings of public functions run and print what they say."""

import doctest

import pytest

from assay import models, poc, streams, vhack
from assay.poc import responses
from assay.vhack import checks, pairs

FUNCTIONS = (
    "Round",
    "prove",
    "verify",
    "calibrate",
    "measure_r_target",
    "measure_block_factor",
    "Build",
    "NetworkPins",
)
VHACK = (
    (vhack, "Basis"),
    (vhack, "extract"),
    (vhack, "per_sample_gradients"),
    (checks, "check"),
    (pairs, "generate_pairs"),
)
STREAMS = ((streams, "step_seeds"),)
RESPONSES = ((responses, "respond"), (responses, "Sampling"), (responses, "ResponseSeed"))


@pytest.mark.parametrize(
    ("package", "name"), [(models, "load_model"), *((poc, name) for name in FUNCTIONS), *STREAMS, *RESPONSES, *VHACK]
)
def test_examples(package, name: str):
    function = getattr(package, name)
    examples = [found for found in doctest.DocTestFinder(recurse=False).find(function, name) if found.examples]
    assert examples, f"help({package.__name__}.{name}) has no example"
    for found in examples:
        assert doctest.DocTestRunner(verbose=False).run(found).failed == 0
