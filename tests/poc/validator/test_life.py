"""Honest and lying nodes, from their first message to a verdict, over HTTP."""

from dataclasses import replace

import numpy as np
import pytest

from assay.models import load_model
from assay.poc import PIPELINES, Calibration, calibrate_model, prove
from assay.poc.net.deployment import Deployment
from assay.poc.protocol.records import encode_vector
from assay.poc.verdict.control import Control
from assay.poc.verdict.residuals import compare
from tests.poc.validator.conftest import BATCH, BLOCK, KEYS, SEQ_LEN, body_of, pins_text, proof_of
from tests.waiting import until


def _shifted(body: dict, by: float = 0.004) -> dict:
    """Distances of another computation: each is off by many times the honest noise of float32."""
    return body | {"dist": [d - by for d in body["dist"]]}


def test_honest_nodes_are_called_honest_and_liars_are_not(validating, small_model):
    with validating() as running:
        for key in KEYS[:2]:
            running.send(body_of(proof_of(small_model, key, range(60))))
        running.send_lies("node_C", _shifted)
        until(lambda: [running.verdict(key) for key in KEYS] == ["honest", "honest", "fraud"])
        first = running.get("/nodes")["nodes"][0]
        assert (first["public_key"], first["verdict"]) == ("node_C", "fraud")
        assert first["seconds_to_decision"] >= 0
        assert 0 < first["nonces_to_decision"] <= first["checked"]
        found = {row["public_key"]: row["verdict"] for row in running.get("/verdicts")["verdicts"]}
        assert found == {"node_A": "honest", "node_B": "honest", "node_C": "fraud"}


@pytest.mark.parametrize("preset", ["artifact", "hardened"])
def test_vectors(validating, small_model, preset):
    with validating(preset=preset) as running:
        strength = {"strength": 256} if preset == "hardened" else {}
        rng = np.random.default_rng(3)

        def invented(body: dict) -> dict:
            for artifact in body["artifacts"]:
                vector = rng.normal(size=PIPELINES[preset].vector_size)
                artifact["vector_b64"] = encode_vector(vector / np.linalg.norm(vector))
            return body

        running.send(body_of(proof_of(small_model, "node_A", range(40), preset=preset, **strength)))
        running.send_lies("node_B", invented, range(70), preset=preset, **strength)
        until(lambda: [running.verdict(key) for key in KEYS[:2]] == ["honest", "fraud"])


@pytest.mark.slow
def test_blocks_with_laws_of_their_own_are_one_test(
    validating, small_model, small_checkpoint, tmp_path
):
    shape = {"seq_len": SEQ_LEN, "formats": ("bfloat16", "float32"), "blocks": 4, "nonces": 64}
    calibrate_model(str(small_checkpoint), **shape, device="cpu").save(tmp_path / "law.json")
    narrow = load_model(small_checkpoint, dtype="bfloat16", device="cpu")
    pins = pins_text(small_model).replace('"float32"', '"bfloat16"')
    with validating(pins=pins, service={"calibration": tmp_path / "law.json"}) as running:
        for height in range(5):
            block = f"block {height}"
            running.announce(block, height)
            running.send(
                body_of(proof_of(narrow, "node_A", range(20), block=block, block_height=height))
            )
        ledger = running.controller.ledger
        until(
            lambda: (
                [len({entry.law for entry in ledger.entries(one)}) for one in ledger.accounts()]
                == [5]
            )
        )
        *_, last = ledger.entries(ledger.accounts()[0])
    assert last.outcome.tests == 1


@pytest.mark.slow
def test_residuals_count_over_the_control_that_a_validator_computes(
    validating, small_model, small_checkpoint, tmp_path
):
    control = Control(
        of="float32", dtypes=("float16",), usual=(5e-3, 5e-3), sizes=(5e-4,), powers=(0.5,)
    )
    shape = {
        "preset": "artifact",
        "seq_len": SEQ_LEN,
        "formats": ("bfloat16", "float32"),
        "blocks": 4,
        "nonces": 64,
    }
    law = calibrate_model(str(small_checkpoint), **shape, device="cpu")
    Calibration(builds=tuple(replace(build, control=control) for build in law.builds)).save(
        tmp_path / "law.json"
    )
    node, again = (
        load_model(small_checkpoint, dtype=name, device="cpu") for name in ("bfloat16", "float16")
    )
    judge = Deployment.of(small_model, compiled=False)
    pins = pins_text(small_model, preset="artifact").replace('"float32"', '"bfloat16"')
    with validating(pins=pins, service={"calibration": tmp_path / "law.json"}) as running:
        running.close()
        running.load = lambda: replace(judge, controls=(Deployment.of(again, compiled=False),))
        running.start()
        proof = proof_of(node, "node_A", range(60), preset="artifact")
        running.send(body_of(proof))
        ledger = running.controller.ledger
        until(lambda: running.verdict("node_A") == "honest")
        entry = next(ledger.entries(ledger.accounts()[0]))
    first, second = (
        {
            record.nonce: record
            for record in prove(model, proof.round, sorted(entry.nonces), batch_size=BATCH).records
        }
        for model in (small_model, again)
    )
    received = {record.nonce: record for record in proof.records}
    claimed, own, others = (
        [side[nonce] for nonce in entry.nonces] for side in (received, first, second)
    )
    wanted = control.scores(*compare(claimed, [own, others]))
    assert entry.residuals == pytest.approx(wanted.tolist(), rel=1e-3)


def test_whole_proofs_are_taken(validating, small_model, tmp_path):
    proof = proof_of(small_model, "node_A", range(64))
    proof.save(tmp_path / "proof.jsonl")
    text = (tmp_path / "proof.jsonl").read_text()
    with validating() as running:
        assert running.send(text, key="node_A", path="proofs", id="p1")["new"] is True
        assert running.send(text, key="node_A", path="proofs", id="p1")["new"] is False
        until(lambda: running.node("node_A")["recorded"] == 64)
        assert running.verdict("node_A") == "honest"
        running.send(text[:-40], key="node_A", path="proofs", status=422)
        running.send("{}\n", key="node_A", path="proofs", status=403)
        running.send("no proof", key="node_A", path="proofs", status=400)


def test_a_nonce_counts_once_however_often_it_is_sent(validating, small_model):
    body = body_of(proof_of(small_model, "node_A", range(60)))
    with validating() as running:
        for id in ("m1", "m1", "m2"):
            running.send(body, id=id)
        until(lambda: running.node("node_A")["recorded"] == len(body["nonces"]))
        node = running.node("node_A")
        assert (node["messages"], node["checked"]) == (2, len(body["nonces"]))
        assert node["claimed"] == len(body["nonces"])
        assert not running.controller.inbox.waiting()
        until(lambda: running.get("/status")["inbox"]["repeated"] == 1)


def test_an_id_that_is_used_again_after_its_message_was_deleted_names_new_evidence(
    validating, small_model
):
    """Otherwise a node that was honest for as long as messages are kept could use its old ids and
    never be checked.
    """
    with validating() as running:
        running.send(body_of(proof_of(small_model, "node_A", range(60))), id="m1")
        until(lambda: running.verdict("node_A") == "honest")
        until(lambda: not running.controller.inbox.waiting())
        until(lambda: running.controller.inbox.prune(-1))
        later = body_of(proof_of(small_model, "node_A", range(60, 160)))
        assert running.send(_shifted(later), id="m1")["new"] is True
        running.send_lies("node_A", _shifted, range(160, 260))
        until(lambda: running.verdict("node_A") == "fraud")


def test_verdicts_of_others_are_kept_and_are_no_evidence(validating, small_model):
    body = {
        "public_key": "node_A",
        "block_hash": BLOCK,
        "block_height": 7,
        "fraud_detected": False,
        "nonces": [0],
    }
    with validating() as running:
        assert running.send(body, path="validated")["new"] is True
        running.send(body, path="generated", status=422)
        running.send(body_of(proof_of(small_model, "node_A")), path="validated", status=422)
        node = running.node("node_A")
        assert (node["messages"], node["claimed"], node["checked"]) == (1, 0, 0)


def test_evidence_can_be_read_back(validating, small_model):
    body = body_of(proof_of(small_model, "node_A", range(40)))
    with validating() as running:
        running.send(body)
        until(lambda: running.node("node_A")["checked"] == len(body["nonces"]))
        account = running.node("node_A")["account"]
        found = running.get(f"/evidence/{account}")
        assert found["account"]["public_key"] == "node_A"
        nonces = [nonce for entry in found["entries"] for nonce in entry["nonces"]]
        assert sorted(nonces) == body["nonces"]
        assert found["ledger"]["entries"] == len(found["entries"])
        rest = running.get(f"/evidence/{account}", after=1, limit=1)
        assert rest["entries"] == found["entries"][1:2]
        assert running.client.get("/api/v1/validator/evidence/none").status_code == 404
