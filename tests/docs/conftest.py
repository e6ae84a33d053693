"""A server that forks the programs of pages, for the test modules that ask for it."""

from collections.abc import Iterator

import pytest

from tests.docs import shell


@pytest.fixture(scope="module")
def warm() -> Iterator[None]:
    """Have `held` run programs of Python as forks (warm.py); the README and the tutorial stay without."""
    with shell.warm():
        yield
