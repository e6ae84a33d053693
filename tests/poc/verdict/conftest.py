"""Fixtures that tests of verdicts share with those of statistics."""

from tests.stats.conftest import fewer as fewer
