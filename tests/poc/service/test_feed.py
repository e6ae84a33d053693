"""What a reader sees: snapshots, streams, metrics, logs without secrets."""

import asyncio
import json
import math
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from assay.poc.net.application import Feed
from assay.poc.net.logs import configure_logs
from assay.poc.net.refusals import Refusal
from tests.poc.service.conftest import BLOCK, PREFIX, ROUND
from tests.poc.service.dashboard.stand_in import snapshot
from tests.poc.service.test_judge import calibration
from tests.waiting import until


@pytest.fixture
def service(serving, rig):
    """A service whose calibration has the effective dimension of the model, without which a block
    has no law.
    """
    with serving(calibration=calibration(rig, rig.deployment().digest, 16)) as service:
        yield service


def test_a_snapshot_follows_the_round(service):
    service.generate(101)
    service.post("/stop")
    seen = service.controller.snapshot()
    n = seen["checked"]
    assert seen["valid"] == service.status()["total_valid"]
    assert seen["valid_rate"] == seen["valid"] / n
    law = service.controller.progress.law
    assert seen["expected_rate"] == law.valid_rate(1.416) == pytest.approx(0.5905, abs=0.03)
    assert seen["expected_rate_error"] == law.rate_error(1.416, n) >= 0.999 * math.sqrt(0.2418 / n)
    assert (seen["block_factor"], seen["block_factor_error"]) == (law.scale, law.factor_error)
    histogram = seen["histogram"]
    assert sum(histogram["counts"]) + histogram["below"] + histogram["above"] == n
    assert sum(histogram["expected"]) == pytest.approx(n, rel=1e-4)
    assert abs(seen["valid_rate"] - seen["expected_rate"]) < 6 * seen["expected_rate_error"]
    assert "callback_url" not in seen["round"]
    json.dumps(seen, allow_nan=False)
    shown = snapshot()  # what the page is tested with
    assert shown.keys() == seen.keys()
    for name in ("model", "round", "histogram", "callbacks", "jobs"):
        assert shown[name].keys() <= seen[name].keys()


def test_snapshots_go_on_after_an_error_that_nobody_thought_of(service, monkeypatch):
    monkeypatch.setattr("assay.poc.net.application.PAUSE", 0.0)
    counts = service.controller.outbox.counts
    failed = []

    def failing() -> dict[str, int]:
        if not failed:
            failed.append(time.time())
            raise LookupError("nobody thought of this")
        return counts()

    monkeypatch.setattr(service.controller.outbox, "counts", failing)
    until(lambda: failed)
    until(lambda: service.client.get(f"{PREFIX}/snapshot").json()["time"] > failed[0])


@pytest.mark.parametrize("bound", ["max_streams", "max_client_streams"])
def test_streams_are_bounded(serving, bound):
    with serving(**{bound: 2}) as service:

        async def open_three() -> None:
            feed = Feed(service.controller)
            streams = [
                await feed.stream("one") for _ in range(2)
            ]  # they count before they are read
            with pytest.raises(Refusal) as refused:
                await feed.stream("one")
            assert refused.value.status == 429
            if bound == "max_client_streams":
                streams.append(await feed.stream("another"))
            for stream in streams:
                await stream.aclose()
            for _ in range(3):  # none of which is read
                await feed.stream("one")
                await asyncio.sleep(0.01)

        asyncio.run(open_three())


def test_metrics_are_valid_and_count(service):
    service.generate(8)
    service.post("/phase/validate")
    service.post("/validate", BLOCK | {"nonces": [0], "dist": [1.4], "node_id": 0})
    until(lambda: service.client.get(f"{PREFIX}/snapshot").json()["state"] == "VALIDATING")
    page = service.client.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
    }
    assert found["assay_poc_nonces_total",] == service.checked()
    assert found["assay_poc_state", "VALIDATING"] == 1
    assert found["assay_poc_state", "GENERATING"] == 0
    assert found["assay_poc_ready",] == 1
    assert found["assay_poc_valid_expected_ratio",] == pytest.approx(0.5905, abs=0.03)
    assert found["assay_poc_http_requests_total", f"{PREFIX}/validate", "200"] == 1
    assert sum(value for name, value in found.items() if name[0] == "assay_poc_verdicts_total") == 1
    assert "block_alpha" not in page.text
    assert "node_A" not in page.text


def test_secrets_are_in_no_log_and_no_answer(serving, capfd):
    key = "key-" + "s3cr3t" * 4
    secret = "whsec_" + "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVoxMjM0"
    token = "t0k3n"
    url = f"http://127.0.0.1:9/hook?token={token}"
    with serving(api_keys=(key,), callback_secrets=(secret,)) as service:
        service.client.headers["Authorization"] = f"Bearer {key}"
        service.post("/init/generate", ROUND | {"callback_url": url})
        until(lambda: service.controller.metrics.deliveries.labels("failed")._value.get() > 0)
        service.post("/stop")
        pages = [
            service.client.get(path).text
            for path in (f"{PREFIX}/status", f"{PREFIX}/snapshot", "/metrics")
        ]
        service.post("/init", ROUND | {"callback_url": 7}, status=422)
    captured = capfd.readouterr()
    assert "callback" in captured.out + captured.err
    for text in (captured.out, captured.err, *pages):
        assert not any(word in text for word in (key, secret, token))


def test_a_log_that_nobody_reads_stops_nothing(service, monkeypatch, restored_logs):
    class Broken:
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "broken pipe")

        def isatty(self) -> bool:
            return False

    configure_logs("json")
    monkeypatch.setattr("sys.stderr", Broken())
    service.generate(9)
    assert service.post("/stop")["pow_status"]["state"] == "STOPPED"
