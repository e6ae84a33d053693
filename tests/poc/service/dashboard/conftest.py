"""One browser per module, and a stand-in with a page open on it."""

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser

from tests.poc.service.dashboard.browser import Watched, chromium
from tests.poc.service.dashboard.stand_in import StandIn


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    running = StandIn()
    yield running
    running.close()


@pytest.fixture
def watch(browser: Browser) -> Iterator[Callable[..., Watched]]:
    """Open a page of a window and scheme; it is closed with the test."""
    opened: list[Watched] = []

    def run(url: str, **options) -> Watched:
        watched = Watched(browser, **options)
        opened.append(watched)
        watched.page.goto(url)
        return watched

    yield run
    for watched in opened:
        watched.page.close()
