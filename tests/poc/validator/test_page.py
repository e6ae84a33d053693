"""The page of a validator in Chromium: what it shows, whose text it trusts, and what it says when
nothing comes.
"""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from assay.poc.net.deployment import Deployment
from assay.poc.service import ServiceSettings
from assay.poc.validator import ValidatorSettings, create_app
from assay.poc.validator.validator_controller import ValidatorController
from tests.poc.service.dashboard import browser as chromium
from tests.poc.service.listening import on_port
from tests.poc.validator.conftest import pins_text

browser = chromium.browser
watch = chromium.watch  # fixtures
pytestmark = pytest.mark.browser

LIVE = "document.body.dataset.link === 'live'"
SNAPSHOT = json.loads(Path(__file__).with_name("snapshot.json").read_text())
NODE = SNAPSHOT["nodes"][-1]
HOSTILE = '<img src=x onerror="document.title=1">\u202eevil\u0000\u2066'


def snapshot(**changes):
    return copy.deepcopy(SNAPSHOT | changes)


class Shown:
    """A validator's page, and the snapshots that a test has it show."""

    def __init__(self, controller: ValidatorController) -> None:
        self.values = snapshot()
        controller.snapshot = lambda: self.values  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def running(small_model, tmp_path_factory) -> Iterator[Shown]:
    """The application of a real validator on a port."""
    directory = tmp_path_factory.mktemp("shown")
    (directory / "pins.toml").write_text(pins_text(small_model))
    settings = ValidatorSettings(pins=directory / "pins.toml")
    load = lambda: Deployment.of(small_model, compiled=False)  # noqa: E731
    controller = ValidatorController(load, settings, ServiceSettings(data_dir=directory / "data"))
    made = Shown(controller)
    app = create_app(controller)
    with on_port(
        uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=1)
    ) as port:
        made.url = f"http://127.0.0.1:{port}"
        yield made


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
    assert "over 1000 to 1" in rows[0]
    assert "none" in rows[0], "no evidence of honesty"
    assert "position mod 16 in 0 to 5" in rows[1]
    assert "–" in rows[2]
    assert "1\u202fmin 33\u202fs" in rows[3]
    assert "40 nonces" in rows[3]
    values = watched.page.evaluate(
        "[...document.querySelectorAll('#node-rows meter')].map((meter) => meter.value)"
    )
    assert values[:2] == [7, 0]
    assert "fraud" in watched.page.locator("#change-rows tr").inner_text()
    assert "hardened, 1024 positions, 256 bits" in watched.text("round")
    assert "ef" * 32 in watched.text("commitment")
    assert watched.page.title() == "1 node fraud · assay"
    assert watched.errors == []
    assert len(watched.origins) == 1


def test_text_of_senders_stays_text(shown, watch):
    node = NODE | {"public_key": HOSTILE, "build": HOSTILE, "verdict": HOSTILE, "fault": HOSTILE}
    change = snapshot()["changes"][0] | {
        "public_key": HOSTILE,
        "verdict": HOSTILE,
        "fault": HOSTILE,
    }
    blocks = [{"block_hash": HOSTILE, "block_height": 1}]
    shown.values = snapshot(
        nodes=[node], changes=[change], blocks=blocks, error=HOSTILE, verdicts={HOSTILE: 1}
    )
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


def test_without_an_open_block_it_shows_how_one_is_announced(running, watch):
    running.values = snapshot() | {"blocks": []}
    watched = watch(running.url)
    watched.wait(LIVE)
    watched.wait("!document.querySelector('#no-blocks').hidden")
    assert f"{running.url.rstrip('/')}/api/v1/validator/blocks" in watched.text("announce")
