"""The law of a round's block: an honest node in a wide block raises no alert, and one that is off
its law does.
"""

import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from assay import stats
from assay.models import load_model
from assay.poc import prover as _prover
from assay.poc.net.deployment import Deployment
from assay.stats.chord import RANDOM_HEAD_ROWS, rate_standard_error
from tests.poc.service.conftest import PREFIX, ROUND
from tests.poc.service.test_judge import calibration
from tests.waiting import until

RULES = Path(__file__).parents[3] / "deploy" / "alerts.yml"
TENTH = stats.r_target_for(0.1, RANDOM_HEAD_ROWS)
WIDE = "blk55"  # its head is long where the bundled models have a fifth of their energy
SHAPE = {"block_hash": WIDE, "seq_len": 16, "batch_size": 32, "r_target": TENTH}


def fires(text: str) -> bool:
    """Whether the rule on the law fires on these metrics, without the time for which it waits."""
    (rule,) = [
        r
        for r in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
        if r["alert"] == "AssayOffTheLaw"
    ]
    values = {
        s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples
    }
    return bool(
        eval(
            re.sub(r"assay_poc_\w+", lambda found: repr(values[found[0]]), rule["expr"]),
            {"abs": abs},
        )
    )


@pytest.fixture(scope="module")
def llama():
    return load_model("reference:llama", dtype="bfloat16", device="cpu")


@pytest.fixture
def measured(rig, serving, llama):
    """Run a round of the model until so many nonces are checked; return the snapshot and the
    metrics.
    """

    def run(least: int, **given) -> tuple[dict, str]:
        rig.deployment = lambda: Deployment.of(llama, compiled=False)
        with serving(seq_len=16, **given) as service:
            service.post("/init/generate", ROUND | SHAPE)
            until(lambda: service.checked() >= least, 60)
            service.post("/stop")
            until(
                lambda: (
                    service.client.get(f"{PREFIX}/snapshot").json()["checked"] == service.checked()
                )
            )
            return service.client.get(f"{PREFIX}/snapshot").json(), service.client.get(
                "/metrics"
            ).text

    return run


@pytest.mark.slow
def test_an_honest_node_in_a_wide_block_raises_no_alert(measured):
    seen, text = measured(1000)
    n, rate, histogram = (seen[name] for name in ("checked", "valid_rate", "histogram"))
    # Against the chord law, with the error of the nonces alone, this node was off by far more than
    # five errors.
    assert abs(rate - 0.1) > 8 * rate_standard_error(0.1, n)
    assert seen["block_factor"] == pytest.approx(1.59, abs=0.1)
    assert abs(rate - seen["expected_rate"]) < 4 * seen["expected_rate_error"] < 0.1
    assert not fires(text)
    assert sum(histogram["expected"]) + histogram["below"] + histogram["above"] == pytest.approx(
        n, rel=0.02
    )
    assert len(histogram["expected_errors"]) == len(histogram["expected"])


def test_the_first_nonces_come_before_the_law_of_their_block(rig, serving, llama, monkeypatch):
    """On a CPU the law takes as long as its 64 nonces, in which a round looked dead."""
    counted = threading.Event()
    monkeypatch.setattr(Deployment, "block_factor", lambda *_: counted.wait(60) and None)
    rig.deployment = lambda: Deployment.of(llama, compiled=False)
    with serving(seq_len=16) as service:
        service.post("/init/generate", ROUND | SHAPE)
        until(lambda: service.checked() >= 1, 30)
        counted.set()
        service.post("/stop")


@pytest.mark.slow
def test_a_calibration_says_how_wide_the_error_is(rig, measured, llama, monkeypatch):
    """As on engines whose states cannot be read: the head is known, and the calibration has the
    effective dimension.
    """
    monkeypatch.setattr(Deployment, "block_factor", lambda *_: None)
    rig.deployment = lambda: Deployment.of(llama, compiled=False)
    seen, text = measured(600, calibration=calibration(rig, llama.digest, 16))
    assert abs(seen["valid_rate"] - 0.1) > 5 * rate_standard_error(0.1, seen["checked"])
    assert seen["expected_rate"] == pytest.approx(0.1, abs=0.03)
    assert seen["expected_rate_error"] > 0.025
    assert not fires(text)


@pytest.mark.slow
def test_a_node_that_is_off_its_law_raises_the_alert(measured, monkeypatch):
    """Distances of another target: the block says nothing about them."""
    compute = _prover.compute

    def shifted(*arguments):
        for batch in compute(*arguments):
            yield [replace(record, distance=record.distance - 0.012) for record in batch]

    monkeypatch.setattr("assay.poc.net.deployment.compute", shifted)
    assert fires(measured(600)[1])
