"""Chromium as the distribution packages it, and what a page does while a test looks at it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.programs import place

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@contextmanager
def chromium(*flags: str) -> Iterator[Browser]:
    """A browser with a profile of its own, and more flags. Each module opens one: its loop lives in
    this thread.
    """
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=place("chromium"), args=[*FLAGS, *flags]
        )
        try:
            yield browser
        finally:
            browser.close()


class Watched:
    """A page with everything that it logged, asked for and threw."""

    def __init__(self, browser: Browser, **options) -> None:
        self.page: Page = browser.new_page(**options)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on(
            "console", lambda said: self.errors.append(said.text) if said.type == "error" else None
        )
        self.page.on("request", lambda request: self.requests.append(request.url))

    @property
    def origins(self) -> set[str]:
        """Where requests went; ``data:`` URLs go nowhere."""
        parts = (urlsplit(url) for url in self.requests if not url.startswith("data:"))
        return {f"{part.scheme}://{part.netloc}" for part in parts}

    def errors_besides(self, *expected: str) -> list[str]:
        return [error for error in self.errors if not any(part in error for part in expected)]

    def text(self, name: str) -> str:
        return self.page.locator(f"#{name}").inner_text()

    def number(self, name: str) -> float:
        return float(self.text(name).replace("\u202f", ""))

    def wait(self, condition: str, timeout: float = 20) -> None:
        """Wait until a JavaScript expression holds. Polled from here: the policy of the page allows
        no ``eval``.
        """
        deadline = time.monotonic() + timeout
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, (condition, self.text("sentence"), self.errors)
            self.page.wait_for_timeout(20)

    def wait_text(self, name: str, part: str, timeout: float = 20) -> None:
        self.page.locator(f"#{name}", has_text=part).wait_for(
            timeout=timeout * 1000, state="attached"
        )

    def overflow(self) -> float:
        """By how many pixels the page is wider than the window."""
        return float(
            self.page.evaluate(
                "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            )
        )


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


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
