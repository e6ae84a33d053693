"""The examples in the docstrings of public functions run and print what they say."""

import doctest

import pytest

from assay import poc

FUNCTIONS = ("prove", "verify", "calibrate", "measure_r_target")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_of_poc(name: str):
    function = getattr(poc, name)
    examples = [found for found in doctest.DocTestFinder(recurse=False).find(function, name) if found.examples]
    assert examples, f"help(assay.poc.{name}) has no example"
    for found in examples:
        assert doctest.DocTestRunner(verbose=False).run(found).failed == 0
