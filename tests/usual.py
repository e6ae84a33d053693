"""How much of a test with many settings or many tries a run takes.

`make test` takes the usual settings and few drawn examples. `make test-all`, and a call of pytest
without a choice of markers, take rarer settings and more examples too. `make soak`, which sets
``ASSAY_SOAK``, also takes settings that show nothing more than others, and tries everything as
often as it says.
"""

import os
from collections.abc import Iterable
from typing import Any

import pytest

FEWER = {True: 6, False: 8}  # times fewer examples, with slow tests and without them
SOAK = "ASSAY_SOAK" in os.environ
choice = {"slow": True}
"""Whether slow tests are among those that were asked for; conftest.py says so."""


def usual(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Return parameters, of which those that are not kept are marked slow."""
    return _marked(values, kept, pytest.mark.slow)


def enough(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Return parameters, of which those that are not kept are marked soak."""
    return _marked(values, kept, pytest.mark.soak)


def _marked(values: Iterable[Any], kept: tuple[Any, ...], mark: pytest.MarkDecorator) -> list[Any]:
    return [value if value in kept else pytest.param(value, marks=mark) for value in values]


def examples(number: int) -> int:
    """Return on how many examples a property is tried, of ``number`` in `make soak`."""
    return number if SOAK else max(3, number // FEWER[choice["slow"]])


def tries(number: int, fewer: int) -> int:
    """Return how often a test tries what it tests: ``number`` times in `make soak` alone."""
    return number if SOAK else fewer
