"""The dashboard of a real service in Chromium: figures move, states change, and a dead service comes back."""

import pytest

from tests.end_to_end.receiver import FlakyReceiver
from tests.poc.service.conftest import ROUND as SERVICE_ROUND
from tests.poc.service.dashboard import browser as chromium
from tests.poc.service.dashboard.browser import Watched

browser = chromium.browser  # fixtures
pytestmark = pytest.mark.browser

ATTACK = "<script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"
ROUND = SERVICE_ROUND | {"block_hash": ATTACK, "batch_size": 8, "seq_len": 8}
LIVE = "document.body.dataset.link === 'live'"


def _figure(name: str) -> str:
    """JavaScript for a figure of the page, which has thin spaces between its thousands."""
    return f"Number(document.getElementById('{name}').textContent.replaceAll('\\u202f', ''))"


def _grows(watched: Watched, name: str) -> None:
    watched.wait(f"{_figure(name)} > {watched.number(name)}")


def test_a_round_is_followed_from_its_start_through_a_crash_to_its_end(launch, browser):
    receiver = FlakyReceiver(trouble=0.0)
    server = launch("--callback-interval", "0.2")
    watched = Watched(browser)
    try:
        watched.page.goto(server.base)
        watched.wait(LIVE)
        assert watched.text("state") == "Idle"
        watched.wait_text("sentence", "Waiting for a round.")

        server.post("/init/generate", ROUND | {"callback_url": receiver.url})
        watched.wait_text("state", "Generating")
        for name in ("checked", "valid"):
            _grows(watched, name)
            _grows(watched, name)
        watched.wait("document.querySelectorAll('#histogram .bar, #histogram .rest').length === 48")
        bars = "[...document.querySelectorAll('#histogram rect')].map((bar) => Number(bar.getAttribute('height')))"
        assert sum(height > 1 for height in watched.page.evaluate(bars)) > 5
        watched.wait(f"{_figure('rate')} > 0")
        watched.wait_text("rate-reading", "expected")
        assert watched.page.locator("#funnel .dot").count() == 1
        assert watched.text("block") == ATTACK
        assert watched.page.evaluate("window.broken") is None

        server.kill()
        watched.wait("document.body.dataset.link === 'lost'")
        assert watched.text("link-text") == "Disconnected"
        assert watched.text("state") == "Generating"
        assert watched.text("sentence").startswith("No connection: ")
        before = watched.number("checked")
        server.start()
        watched.wait(LIVE, timeout=60)
        server.wait_for()
        watched.wait(f"{_figure('checked')} > {before}")

        server.post("/stop")
        watched.wait_text("state", "Stopped")
        stopped = server.status()["total_checked"]
        watched.wait(f"{_figure('checked')} === {stopped}")
        watched.wait(f"{_figure('pending')} === 0")
        server.post("/phase/validate")
        watched.wait_text("state", "Validating")

        # What Chromium itself reports of the attempts while no server listened is the only noise.
        assert watched.errors_besides("net::ERR_") == []
        assert watched.origins == {server.base}
    finally:
        watched.page.close()
        receiver.close()
