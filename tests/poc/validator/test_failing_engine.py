"""An engine that fails: everyone can see it, and the process ends after a stated number of tries."""

import json
import re
import subprocess
import sys

import pytest
from structlog.testing import capture_logs

from assay.errors import EngineEnded
from assay.poc.validator import recomputer
from tests.poc.service.conftest import signed
from tests.poc.validator.conftest import API, body_of, proof_of, secret_of
from tests.poc.validator.senders import ValidatorServer, write_network
from tests.waiting import until

FAULT = "CUDA error: device-side assert triggered"


@pytest.fixture
def quick(monkeypatch):
    """Failed passes follow each other without a pause."""
    monkeypatch.setattr(recomputer, "FAILURE_PAUSE", 0.01)
    with capture_logs() as lines:  # tracebacks with all local values take seconds
        yield lines


def _failing(monkeypatch, error: Exception, times: int = 10**9) -> list[int]:
    real = recomputer.recompute
    passes: list[int] = []

    def fails(*arguments):
        passes.append(len(passes))
        if len(passes) <= times:
            raise error
        return real(*arguments)

    monkeypatch.setattr(recomputer, "recompute", fails)
    return passes


def test_an_engine_that_keeps_failing_is_shown_and_ends_the_process(
    validating, small_model, monkeypatch, quick
):
    passes = _failing(monkeypatch, RuntimeError(FAULT))
    with validating() as running:
        running.send(body_of(proof_of(small_model, "node_A")))
        until(lambda: running.controller.failed.done())
        assert len(passes) >= recomputer.MOST_FAILURES
        error = running.controller.failed.exception()
        assert isinstance(error, EngineEnded)
        assert FAULT in error.seen
        assert "exit code 2" in error.do
        until(lambda: FAULT in str(running.get("/status")["error"]))
        assert all(line["wanted"] and line["do"] for line in quick if "exc_info" in line)
        assert running.client.get("/ready").status_code == 503
        running.send(body_of(proof_of(small_model, "node_B")))  # and messages are still taken


def test_an_engine_that_recovers_begins_to_count_again(validating, small_model, monkeypatch, quick):
    passes = _failing(monkeypatch, RuntimeError(FAULT), recomputer.MOST_FAILURES - 1)
    with validating() as running:
        running.send(body_of(proof_of(small_model, "node_A")))
        until(lambda: running.node("node_A")["checked"] > 0)
        until(lambda: running.get("/status")["error"] is None)
        assert len(passes) >= recomputer.MOST_FAILURES
        assert not running.controller.failed.done()


@pytest.mark.parametrize("error", [ValueError("cut"), KeyError("nonce"), OverflowError("big")])
def test_a_message_on_which_the_code_fails_stops_no_other_node(
    validating, small_model, monkeypatch, quick, error
):
    real = recomputer.recompute

    def fails(deployment, batch_size, inputs, *received):
        if any(each.round.public_key == "node_A" for each in inputs):
            raise error
        return real(deployment, batch_size, inputs, *received)

    monkeypatch.setattr(recomputer, "recompute", fails)
    with validating() as running:
        running.send(body_of(proof_of(small_model, "node_A")))
        running.send(body_of(proof_of(small_model, "node_B")))
        until(lambda: running.node("node_B")["checked"] > 0)
        assert not running.controller.failed.done()


@pytest.mark.slow
def test_the_process_of_a_failing_engine_ends_with_code_2_in_words(
    tmp_path, small_model, small_checkpoint
):
    write_network(tmp_path, small_model, ["node_A"])
    rate = ("--nonces-per-hour", "1000000")
    server = ValidatorServer(tmp_path, *rate, model=small_checkpoint, fork=False)
    (tmp_path / "broken.py").write_text(
        "import sys\n"
        "from assay.cli import run\n"
        "from assay.poc.validator import recomputer\n"
        "def fails(*arguments):\n"
        f"    raise RuntimeError({FAULT!r})\n"
        "recomputer.recompute = fails\n"
        "recomputer.FAILURE_PAUSE = 0.01\n"
        "sys.exit(run(sys.argv[1:]))\n"
    )
    command = [sys.executable, str(tmp_path / "broken.py"), *server.arguments]
    with server.log.open("ab") as log:
        server.process = process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        server.wait_for("/health", 200)
        server.announce()
        body = body_of(proof_of(small_model, "node_A"))
        sent = signed(secret_of("node_A"), json.dumps(body), "m1")
        assert server.call("POST", f"{API}/generated", body, **sent)[0] == 200
        assert process.wait(60) == 2
    finally:
        server.close()
    log_text = server.log.read_text()
    assert re.search(rf"{recomputer.MOST_FAILURES} in a row failed", log_text)
    assert "wanted" in log_text.splitlines()[-2]
