"""What `make test` takes of a test with many settings: the usual ones, and fewer drawn examples.

`make test-all`, and a call of pytest without a choice of markers, take everything.
"""

from collections.abc import Iterable
from typing import Any

import pytest

FEWER = 8  # times fewer examples where slow tests are left out
choice = {"slow": True}
"""Whether slow tests are among those that were asked for; conftest.py says so."""


def usual(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Return parameters, of which those that are not kept are marked slow."""
    return [
        value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values
    ]


def examples(number: int) -> int:
    """Return how many examples a property is tried on, of those of `make test-all`."""
    return number if choice["slow"] else max(3, number // FEWER)
