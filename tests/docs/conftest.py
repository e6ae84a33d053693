"""Whether the programs of pages are forked, for the test modules that ask for it."""

import shlex

import pytest

from tests.docs import shell


@pytest.fixture(scope="module")
def warm(fork_server):
    """Have `held` run programs of Python as forks (warm.py); the README stays without."""
    shell.ahead = shlex.join(fork_server)
    yield
    shell.ahead = ""
