"""Keys, bounds, figures and failures: what a validator has as a service has it."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from assay.errors import UsageError
from assay.poc.net.deployment import Deployment
from assay.poc.service import ServiceSettings
from assay.poc.validator import ValidatorSettings, validate
from assay.poc.validator import intake as _intake
from assay.poc.validator import recomputer as _worker
from assay.poc.validator.inbox import Inbox
from assay.poc.validator.validator_controller import ValidatorController
from tests.poc.service.conftest import FULL, failing, signed
from tests.poc.service.series import absent_series
from tests.poc.validator.conftest import API, body_of, nodes_text, pins_text, proof_of, secret_of
from tests.waiting import until
from tests.wordings import refuses

ROOT = Path(__file__).parents[3]
KEY = "all-" + "x" * 20
READ = "read-" + "x" * 20


@pytest.mark.slow
def test_everything_but_signed_messages_and_commitments_needs_a_key(validating, small_model):
    with validating(service={"api_keys": (KEY,), "read_keys": (READ,)}) as running:
        running.send(body_of(proof_of(small_model, "node_A")))
        paths = [
            f"{API}/{name}"
            for name in ("status", "nodes", "verdicts", "evidence/x", "events", "blocks")
        ]
        for path in [*paths, "/metrics"]:
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                assert running.client.get(path, headers=headers).status_code == 401, path
        reader = {"Authorization": f"Bearer {READ}"}
        assert running.client.get(f"{API}/nodes", headers=reader).status_code == 200
        body = {"block_hash": "b", "block_height": 1}
        assert running.client.post(f"{API}/blocks", json=body, headers=reader).status_code == 403
        for path in (f"{API}/commitments", "/health", "/"):
            assert running.client.get(path).status_code == 200, path


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Origin": "https://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
def test_without_a_key_only_this_machine_is_answered(validating, headers):
    with validating() as running:
        for method, path in (
            ("GET", f"{API}/nodes"),
            ("POST", f"{API}/generated"),
            ("POST", f"{API}/blocks"),
        ):
            assert running.client.request(method, path, headers=headers).status_code == 403, path


def test_others_reach_a_validator_only_with_keys_and_secrets(small_model, tmp_path):
    (tmp_path / "pins.toml").write_text(pins_text(small_model))
    settings = ValidatorSettings(pins=tmp_path / "pins.toml")
    load = lambda: Deployment.of(small_model, compiled=False)  # noqa: E731
    for service, seen in (({}, "without a key"), ({"api_keys": (KEY,)}, "sign nothing")):
        made = ServiceSettings(data_dir=tmp_path / "data", **service)
        with pytest.raises(UsageError, match=seen):
            validate(load, settings, made, reference="m", host="0.0.0.0", port=0)
    assert not (tmp_path / "data").exists()


def test_bodies_are_bounded(validating, small_model):
    with validating(service={"max_body": 1000}, max_proof=2000) as running:
        body = body_of(proof_of(small_model, "node_A"))
        assert (
            running.send(body | {"nonces": list(range(500))}, status=413)["detail"]
            == "a body that is too large"
        )
        running.send("x" * 3000, key="node_A", path="proofs", status=413)
        assert running.client.post(f"{API}/blocks", content=b"x" * 2000).status_code == 413


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"block_hash": "b"},
        {"block_hash": "", "block_height": 1},
        {"block_hash": "b\n", "block_height": 1},
    ],
)
def test_a_block_that_is_not_one_is_refused_in_three_parts(validating, body):
    with validating() as running:
        answer = running.client.post(f"{API}/blocks", json=body)
        assert (answer.status_code, {"detail", "wanted", "do"} <= answer.json().keys()) == (
            422,
            True,
        )
        for path, status in (
            (f"{API}/nodes?limit=0", 422),
            (f"{API}/nodes?after=-1", 422),
            ("/nothing", 404),
        ):
            answer = running.client.get(path)
            assert (answer.status_code, {"detail", "wanted", "do"} <= answer.json().keys()) == (
                status,
                True,
            )


def test_every_series_that_is_asked_for_exists_before_anything_has_happened(validating):
    with validating() as running:
        text = running.client.get("/metrics").text
    rules = yaml.safe_load((ROOT / "deploy" / "validator-alerts.yml").read_text())["groups"][0][
        "rules"
    ]
    asked = [rule["expr"] for rule in rules]
    others = [
        'assay_validator_messages_total{kind="pulled", as="repeated"}',
        'assay_validator_polls_total{outcome="failed"}',
        "process_resident_memory_bytes",
    ]
    assert not absent_series(text, asked + others)
    assert absent_series(text, ['assay_validator_refused_total{value="another"}'])


def test_messages_are_taken_while_the_model_is_loaded(small_model, validating):
    gate = threading.Event()
    with validating() as running:
        running.close()

        def load():
            assert gate.wait(30)
            return Deployment.of(small_model, compiled=False)

        running.load = load
        running.start()
        assert running.client.get("/ready").status_code == 503
        assert running.client.get("/health").status_code == 200
        assert running.send(body_of(proof_of(small_model, "node_A", range(60))))["new"] is True
        gate.set()
        until(lambda: running.verdict("node_A") == "honest")
        assert running.client.get("/ready").status_code == 200


@pytest.fixture
def begun(small_model, tmp_path):
    """Start the controller of a validator on some pins, whose model is loaded once an event is
    set.
    """

    def run(pins: str | None = None, gate: threading.Event | None = None) -> ValidatorController:
        def load():
            assert gate is None or gate.wait(30)
            return Deployment.of(small_model, compiled=False)

        (tmp_path / "pins.toml").write_text(pins or pins_text(small_model))
        settings = ValidatorSettings(pins=tmp_path / "pins.toml")
        service = ServiceSettings(data_dir=tmp_path / "data")
        controller = ValidatorController(load, settings, service)
        controller.start()
        return controller

    return run


def test_an_end_while_the_thread_begins_waits_for_it(begun, monkeypatch):
    begins = threading.Event()

    class Slow(threading.Thread):
        def start(self):
            if self.name == "assay-worker":
                begins.set()
                time.sleep(0.5)
            super().start()

    monkeypatch.setattr(threading, "Thread", Slow)
    controller = begun()
    assert begins.wait(30)
    controller.close()
    controller.loaded.result(30)
    assert controller.worker.close()


def test_a_model_that_loads_beyond_the_end_is_known(begun):
    """The server ends the process then: torch aborts where Python ends under a thread that
    loads.
    """
    controller = begun(gate=(gate := threading.Event()))
    controller.close()
    assert not controller.ended
    gate.set()
    until(controller.worker.close)


def test_another_checkpoint_than_the_pins_is_not_run(small_model, begun):
    controller = begun(pins_text(small_model).replace(small_model.digest, "0" * 64))
    with pytest.raises(UsageError, match=small_model.digest[:12]):
        controller.loaded.result(30)
    assert controller.error is not None
    controller.close()


@pytest.mark.slow
def test_nodes_are_read_again_when_their_file_changes(validating, small_model, tmp_path):
    with validating() as running:
        body = body_of(proof_of(small_model, "node_A"))
        (tmp_path / "nodes.toml").write_text(nodes_text().replace("whsec_", "whsec_AAAA", 1))
        until(lambda: running.controller.registry.senders["node_A"].signatures)
        until(lambda: _status_of(running, body) == 401)
        (tmp_path / "nodes.toml").write_text("[[nodes]]\npublic_key = 7\n")
        running.controller.tend()
        assert _status_of(running, body) == 401  # a file that is wrong changes nothing
        (tmp_path / "nodes.toml").write_text(nodes_text())
        until(lambda: _status_of(running, body) == 200)


def test_a_network_says_how_many_false_convictions_it_accepts(validating, small_model, tmp_path):
    stated = "\n[network]\nnodes = 50\nfalse_convictions = {}\n"
    with validating(pins=pins_text(small_model) + stated.format(0.5)) as running:
        until(lambda: running.get("/status")["network"])
        found = running.get("/status")["network"]
        assert (found["nodes"], found["false_convictions"], found["alpha"], found["expected"]) == (
            50,
            0.5,
            0.01,
            None,
        )
        assert running.controller.ledger.genesis.alpha == 0.01
        (tmp_path / "pins.toml").write_text(pins_text(small_model) + stated.format(5))
        running.controller.tend()
        assert running.controller.registry.alpha == 0.01, "a ledger keeps its alpha"
        with refuses(UsageError, "a network says how many false convictions it accepts"):
            running.restart()
        (tmp_path / "pins.toml").write_text(pins_text(small_model) + stated.format(0.5))
        running.start()


def _status_of(running, body) -> int:
    text = json.dumps(body)
    headers = signed(secret_of(body["public_key"]), text, "probe")
    return int(running.client.post(f"{API}/generated", content=text, headers=headers).status_code)


def test_a_full_disk_refuses_messages_and_recovers(validating, small_model, monkeypatch):
    body = body_of(proof_of(small_model, "node_A"))
    with validating() as running:
        # The second one is tried again and again, and would say that there is room.
        full = [failing(monkeypatch, Inbox, name, FULL) for name in ("add", "roll")]
        answer = running.send(body, id="m", status=503)
        assert answer["fields"] == ["busy"]
        until(lambda: running.get("/status")["storage_failing"] is True)
        for errors in full:
            errors.clear()
        until(lambda: running.get("/status")["storage_failing"] is False)
        assert running.send(body, id="m")["new"] is True


def test_a_fault_of_the_code_refuses_messages_and_is_said(validating, small_model, monkeypatch):
    """The thread that writes lives on: a sender is never left waiting, and the operator sees the
    reason.
    """
    body = body_of(proof_of(small_model, "node_A"))
    with validating() as running:
        running.wait_ready()
        broken = failing(monkeypatch, Inbox, "add", AssertionError("a fault of the code"))
        assert running.send(body, id="m", status=503)["fields"] == ["busy"]
        assert running.controller.error == "AssertionError: a fault of the code"
        assert running.client.get("/ready").status_code == 503
        broken.clear()
        assert running.send(body, id="m")["new"] is True
        running.wait_ready()


def test_a_node_has_its_own_room_on_the_disk(validating, small_model):
    """Whoever fills it is told to come later, and takes nothing from the others."""
    first, second, third = (
        body_of(proof_of(small_model, "node_A", range(i, i + 40))) for i in (0, 40, 80)
    )
    other = body_of(proof_of(small_model, "node_B", range(40)))
    with validating(max_kept=7 * len(json.dumps(first))) as running:
        assert running.send(first, id="m1")["new"]
        assert running.send(second, id="m2")["new"]
        refusal = running.send(third, id="m3", status=429)
        assert refusal["fields"] == ["room"]
        assert "`max_kept` under [poc.validator]" in refusal["wanted"]
        assert running.send(other, id="m1")["new"]


def test_one_node_cannot_hold_all_parses_of_proofs(validating, small_model, monkeypatch, tmp_path):
    """Its proofs are parsed one after the other, whatever they cost."""
    go = threading.Event()
    real = _intake.read_proof
    proofs = dict[str, str]()
    for key in ("node_A", "node_B"):
        proof_of(small_model, key).save(tmp_path / key)
        proofs[key] = (tmp_path / key).read_text()

    def slow(body: bytes, reader: object) -> object:
        assert b"node_A" not in body[:2000] or go.wait(20)
        return real(body, reader)

    monkeypatch.setattr(_intake, "read_proof", slow)
    with validating() as running, ThreadPoolExecutor() as pool:
        held = [
            pool.submit(running.send, proofs["node_A"], key="node_A", id=f"m{i}", path="proofs")
            for i in range(3)
        ]
        other = pool.submit(running.send, proofs["node_B"], key="node_B", id="n", path="proofs")
        try:
            assert other.result(15)["new"]
            assert not any(one.done() for one in held)
        finally:
            go.set()


def test_an_engine_that_fails_is_said_and_messages_are_still_taken(
    validating, small_model, monkeypatch
):
    with validating() as running:
        running.wait_ready()
        monkeypatch.setattr("assay.poc.validator.recomputer.FAILURE_PAUSE", 0.05)
        broken = failing(monkeypatch, _worker, "recompute", RuntimeError("the device has gone"))
        running.send(body_of(proof_of(small_model, "node_A", range(60))))
        until(lambda: running.client.get("/ready").status_code == 503)
        assert "the device has gone" in running.client.get("/ready").json()["detail"]
        assert running.send(body_of(proof_of(small_model, "node_B")))["new"] is True
        broken.clear()
        until(lambda: running.verdict("node_A") == "honest")
        until(lambda: running.client.get("/ready").status_code == 200)
