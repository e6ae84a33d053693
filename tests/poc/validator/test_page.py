"""The page of a validator in Chromium: what it shows, whose text it trusts, and what it says when nothing comes."""

import copy
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from assay.poc.net.deployment import Deployment
from assay.poc.service import Settings
from assay.poc.validator import ValidatorSettings, create_app
from assay.poc.validator.controller import ValidatorController
from tests.end_to_end.server import free_port
from tests.poc.service.dashboard import browser as chromium
from tests.poc.validator.conftest import nodes_text, pins_text
from tests.waiting import until

browser, watch = chromium.browser, chromium.watch  # fixtures
pytestmark = pytest.mark.browser

LIVE = "document.body.dataset.link === 'live'"
SNAPSHOT = json.loads(Path(__file__).with_name("snapshot.json").read_text())
NODE = SNAPSHOT["nodes"][-1]
HOSTILE = '<img src=x onerror="document.title=1">\u202eevil\u0000\u2066'


def snapshot(**changes):
    return copy.deepcopy(SNAPSHOT | changes)


class Shown:
    """A real validator's application on a port, whose snapshots a test writes."""

    def __init__(self, model, directory, **service) -> None:
        (directory / "pins.toml").write_text(pins_text(model))
        (directory / "nodes.toml").write_text(nodes_text())
        settings = ValidatorSettings(pins=directory / "pins.toml", nodes=directory / "nodes.toml")
        values = {"data_dir": directory / "data"} | service
        load = lambda: Deployment.of(model, compiled=False)  # noqa: E731
        self.controller = ValidatorController(load, settings, Settings(**values))
        self.values = snapshot()
        self.controller.snapshot = lambda: self.values  # type: ignore[method-assign]
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            create_app(self.controller), port=self.port, log_config=None, ws="none", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        until(lambda: self._server.started)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture(scope="module")
def running(small_model, tmp_path_factory) -> Iterator[Shown]:
    made = Shown(small_model, tmp_path_factory.mktemp("shown"))
    yield made
    made.close()


@pytest.fixture
def shown(running) -> Shown:
    running.values = snapshot()
    return running


def test_it_shows_nodes_verdicts_and_what_is_accepted(shown, watch):
    watched = watch(shown.url)
    watched.wait(LIVE)
    assert watched.text("state") == "Validating"
    assert watched.text("sentence") == "Recomputing a sample of 3 nodes."
    assert [watched.text(name) for name in ("honest", "undecided", "faulty", "fraud")] == ["1"] * 4
    assert watched.number("recomputed") == 4321
    rows = watched.page.locator("#node-rows tr").all_inner_texts()
    assert [re.sub(r"\s+", " ", row).split()[:2] for row in rows] == [
        ["✕", "fraud"],
        ["!", "faulty"],
        ["?", "undecided"],
        ["✓", "honest"],
    ]
    assert "e^9.1" in rows[0]
    assert "e^−4.0" in rows[0]
    assert "position mod 16 in 0 to 5" in rows[1]
    assert "–" in rows[2]
    assert "1\u202fmin 33\u202fs" in rows[3]
    assert "40 nonces" in rows[3]
    values = watched.page.evaluate("[...document.querySelectorAll('#node-rows meter')].map((meter) => meter.value)")
    assert values[:2] == [7, 0]
    assert "fraud" in watched.page.locator("#change-rows tr").inner_text()
    assert "hardened, 1024 positions, 256 bits" in watched.text("round")
    assert "ef" * 32 in watched.text("commitment")
    assert watched.page.title() == "1 node fraud · assay"
    assert watched.errors == []
    assert len(watched.origins) == 1


def test_text_of_senders_stays_text(shown, watch):
    node = NODE | {"public_key": HOSTILE, "build": HOSTILE, "verdict": HOSTILE, "fault": HOSTILE}
    change = snapshot()["changes"][0] | {"public_key": HOSTILE, "verdict": HOSTILE, "fault": HOSTILE}
    blocks = [{"block_hash": HOSTILE, "block_height": 1}]
    shown.values = snapshot(nodes=[node], changes=[change], blocks=blocks, error=HOSTILE, verdicts={HOSTILE: 1})
    shown.values["model"]["reference"] = HOSTILE
    watched = watch(shown.url)
    watched.wait(LIVE)
    watched.wait("document.querySelectorAll('#node-rows tr').length === 1")
    assert watched.page.locator("main img").count() == 0
    text = watched.page.locator("body").inner_text()
    assert "<img src=x" in text
    assert not set("\u202e\u0000\u2066") & set(text)
    assert watched.page.title() == "Validating · assay"
    assert watched.errors == []
    assert len(watched.origins) == 1


def test_it_asks_for_a_key_and_shows_nothing_before(small_model, tmp_path, watch):
    shown = Shown(small_model, tmp_path, read_keys=("read-key-of-the-test",))
    try:
        watched = watch(shown.url)
        watched.wait("document.body.dataset.link === 'key'")
        assert watched.text("state") == "Locked"
        assert not watched.page.locator("#main").is_visible()
        watched.page.fill("#key", "read-key-of-the-test")
        watched.page.click("#key-form button")
        watched.wait(LIVE)
        assert watched.page.locator("#node-rows tr").count() == 4
        assert watched.errors_besides("401") == []
    finally:
        shown.close()
