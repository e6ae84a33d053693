"""The page of a validator in Chromium: what it shows, whose text it trusts, and what it says when nothing comes."""

import copy
import re
import threading
from collections.abc import Iterator

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
NODE = {
    "public_key": "node_A",
    "account": "ab" * 8,
    "verdict": "honest",
    "build": "H100",
    "checked": 48,
    "recorded": 50,
    "log_e_value": 0.0,
    "log_evidence_honest": 5.2,
    "fault": None,
    "messages": 3,
    "claimed": 400,
    "first_at": 1_790_000_000.0,
    "last_at": 1_790_000_050.0,
    "decided_at": 1_790_000_040.0,
    "seconds_to_decision": 93.0,
    "nonces_to_decision": 40,
}
HOSTILE = '<img src=x onerror="document.title=1">\u202eevil\u0000\u2066'


def snapshot(**changes):
    nodes = [
        NODE | {"public_key": "node_C", "verdict": "fraud", "log_e_value": 9.1, "log_evidence_honest": -4.0},
        NODE | {"public_key": "node_F", "verdict": "faulty", "fault": "position mod 16 in 0 to 5"},
        NODE
        | {"public_key": "node_U", "verdict": "undecided", "seconds_to_decision": None, "nonces_to_decision": None},
        NODE,
    ]
    change = {"id": 1, "public_key": "node_C", "account": "cd" * 8, "at": 1_790_000_000.0, "verdict": "fraud"}
    change |= {"nonces": 12, "seconds": 30.0, "fault": None}
    return copy.deepcopy(
        {
            "schema": "assay.poc.validator/1",
            "time": 1_790_000_100.0,
            "version": "0.1.0",
            "uptime_seconds": 93_784.0,
            "ready": True,
            "error": None,
            "storage_failing": False,
            "model": {"reference": "reference:qwen3", "digest": "ab" * 32},
            "pins": {"preset": "hardened", "seq_len": 1024, "strength": 256, "r_target": None},
            "blocks": [{"block_hash": "block_alpha", "block_height": 7}],
            "inbox": {"messages": 1234, "nonces": 98_765, "repeated": 12},
            "nonces_per_hour": 3600,
            "recomputed": 4321,
            "nodes_pinned": 10,
            "nodes_waiting": 3,
            "verdicts": {"honest": 1, "fraud": 1, "faulty": 1, "undecided": 1},
            "epoch": {"epoch": 3, "begins": 1.0, "ends": None, "commitment": "ef" * 32, "secret": None},
            "nodes": nodes,
            "changes": [change],
        }
        | changes
    )


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


def test_it_follows_what_happens(shown, watch):
    watched = watch(shown.url)
    watched.wait(LIVE)
    shown.values = snapshot(verdicts={"honest": 2}, nodes=[NODE], changes=[], nodes_waiting=0)
    watched.wait_text("sentence", "Waiting for messages.")
    assert watched.text("honest") == "2"
    assert watched.page.locator("#node-rows tr").count() == 1
    assert watched.page.locator("#no-changes").is_visible()
    assert watched.page.title() == "Validating · assay"


@pytest.mark.parametrize(
    ("change", "words", "kind"),
    [
        ({"blocks": []}, "No block is open", "undecided"),
        ({"storage_failing": True}, "The disk takes nothing", "fail"),
        ({"error": "no room for <b>this</b> batch"}, "no room for <b>this</b> batch", "fail"),
        ({"ready": False}, "The model is being loaded", "undecided"),
        ({"ready": False, "error": "no such model"}, "could not be loaded: no such model", "fail"),
        ({"schema": "assay.poc.validator/2"}, "load it again", "undecided"),
    ],
)
def test_it_says_what_is_wrong(shown, watch, change, words, kind):
    shown.values = snapshot(**change)
    watched = watch(shown.url)
    watched.wait_text("sentence", words)
    assert kind in watched.page.locator("#sentence").get_attribute("class")


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


@pytest.mark.parametrize("width", [360, 820, 1400])
def test_it_fits_every_window(shown, watch, width):
    long = NODE | {"public_key": "k" * 600, "build": "b" * 200, "fault": "f" * 300}
    shown.values = snapshot(nodes=[long] * 200, verdicts={"honest": 1000})
    watched = watch(shown.url, viewport={"width": width, "height": 800})
    watched.wait(LIVE)
    watched.wait("document.querySelectorAll('#node-rows tr').length === 200")
    assert watched.overflow() <= 0
    assert "The first 200 of 1\u202f000 nodes" in watched.text("nodes-reading")


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


def test_the_end_of_the_validator_is_shown(small_model, tmp_path, watch):
    shown = Shown(small_model, tmp_path)
    watched = watch(shown.url)
    watched.wait(LIVE)
    shown.close()
    watched.wait("document.body.dataset.link === 'lost'")
    assert "No connection" in watched.text("sentence")


def test_the_policy_allows_nothing_but_the_page_itself(shown, watch):
    page = watch("about:blank").page
    response = page.goto(shown.url)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    text = response.text()
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "localStorage"):
        assert way not in text
    html, script = text.split("<script", 1)
    names = set(re.findall(r'(?:\$|put|putName)\("([\w-]+)"', script))
    assert len(names) > 20
    assert all(html.count(f' id="{name}"') == 1 for name in names), names
