"""A stand-in with a page open on it."""

from collections.abc import Iterator

import pytest

from tests.poc.service.dashboard import browser as chromium
from tests.poc.service.dashboard.stand_in import StandIn

browser = chromium.browser
watch = chromium.watch  # fixtures


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with StandIn() as running:
        yield running
