"""The chain's decode proof on the wire, in the fields of its client: `params.decode`, `max_tokens`
and `k_points_steps`.
"""

from dataclasses import replace

import numpy as np
import pytest

from assay.models import load_model
from assay.poc import Round, prove
from assay.poc.net.deployment import Deployment
from assay.poc.protocol.records import pack_points
from assay.poc.service.distance_judge import HonestNoise
from assay.poc.service.request_bodies import GenerateRequest
from assay.poc.validator.claims import Claim
from assay.poc.verdict.honest_noise import bundled_noise
from tests.end_to_end.receiver import FlakyReceiver
from tests.poc.service.conftest import ARTIFACTS
from tests.waiting import until

T = 16
N = 8
NONCES = 12
ASKED = {"model": "small", "seq_len": T, "decode": True, "max_tokens": N}
"""What the client sends of a decode proof: no k_dim, no batch size, no preset."""


@pytest.fixture(scope="module")
def model():
    return load_model("reference:qwen3", dtype="float32", device="cpu")


@pytest.fixture
def service(rig, serving, model):
    made = replace(Deployment.of(model, compiled=False), reference="small")
    rig.deployment = lambda: made
    with serving(seq_len=T) as running:
        yield running


def job(**changes: object) -> dict[str, object]:
    body = {name: value for name, value in ARTIFACTS.items() if name != "batch_size"}
    return body | {"params": ASKED, "nonces": list(range(NONCES)), "wait": True} | changes


@pytest.fixture(scope="module")
def proof(model):
    round = Round(
        block_hash="block_alpha",
        public_key="node_A",
        preset=f"chain-decode-{N}",
        seq_len=T,
        block_height=7,
    )
    return prove(model, round, range(NONCES), batch_size=16)


def checked(service, artifacts, **stat_test: float):
    rule = {"stat_test": stat_test} if stat_test else {}
    return service.post("/generate", job(validation={"artifacts": artifacts}, **rule))


def test_a_job_gives_the_points_of_prove_in_the_fields_of_the_client(service, proof):
    reply = service.post("/generate", job())
    artifacts = reply["artifacts"]
    assert {tuple(artifact) for artifact in artifacts} == {
        ("nonce", "vector_b64", "k_points_steps")
    }
    for artifact, record in zip(artifacts, proof.records, strict=True):
        assert artifact["nonce"] == record.nonce
        assert artifact["vector_b64"] == ""
        assert artifact["k_points_steps"] == record.points.tolist()
    by_scheme = {name: value for name, value in ASKED.items() if name != "decode"}
    again = service.post("/generate", job(params=by_scheme | {"scheme": "decode"}))
    assert again["artifacts"] == artifacts


def test_a_validation_counts_nonces_by_their_largest_margin(service, proof):
    honest = [
        {"nonce": record.nonce, "vector_b64": "", "k_points_steps": record.points.tolist()}
        for record in proof.records
    ]
    reply = checked(service, honest)
    assert (reply["n_total"], reply["n_mismatch"], reply["fraud_detected"]) == (NONCES, 0, False)
    drawn = np.random.default_rng(0).integers(0, 16, (NONCES, N + 1)).tolist()
    lies = [artifact | {"k_points_steps": row} for artifact, row in zip(honest, drawn, strict=True)]
    reply = checked(service, lies)
    assert (reply["n_mismatch"], reply["fraud_detected"]) == (NONCES, True)
    # Under the threshold that the client sends by default, drawn points pass: no cosine is so far.
    bounds = {"dist_threshold": 0.4, "p_mismatch": 0.1, "p_value_threshold": 0.05}
    reply = checked(service, lies, **bounds)
    assert (reply["n_mismatch"], reply["fraud_detected"]) == (0, False)
    outside = [honest[0] | {"k_points_steps": [99] * (N + 1)}, *honest[1:]]
    reply = checked(service, outside, **bounds)
    assert reply["mismatch_nonces"] == [0]
    short = [honest[0] | {"k_points_steps": [1, 2]}, *honest[1:]]
    assert checked(service, short, **bounds)["mismatch_nonces"] == [0]


def test_a_nonce_that_stands_twice_proves_no_more_than_once(service, model, proof, monkeypatch):
    noise = bundled_noise(model.digest, "points", "float32", "float32")
    monkeypatch.setattr(HonestNoise, "of", lambda *_: noise)
    artifacts = [
        {"nonce": record.nonce, "k_points_steps": record.points.tolist()}
        for record in proof.records[:2]
    ]
    asked = job(nonces=[1, 0] + [1] * 20, validation={"artifacts": artifacts})
    reply = service.client.post("/api/v1/inference/pow/generate", json=asked).json()
    assert (reply["n_total"], reply["residual_test"]["checked"]) == (22, 2)


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"params": ASKED | {"max_tokens": 0}}, 422),
        ({"params": ASKED | {"max_tokens": 4097}}, 422),
        ({"validation": {"artifacts": [{"nonce": n} for n in range(NONCES)]}}, 422),
        (
            {"validation": {"artifacts": [{"nonce": n, "vector_b64": ""} for n in range(NONCES)]}},
            400,
        ),
    ],
)
def test_what_no_decode_proof_has_is_refused(service, changed, status: int):
    service.post("/generate", job(**changed), status=status)


def test_numbers_of_a_claim_are_not_kept_as_they_were_sent():
    """A job of one nonce would fill the disk."""
    sent = {"nonce": 0, "k_points_steps": [10**200] * 4097}
    request = GenerateRequest.model_validate(job(nonces=[0], validation={"artifacts": [sent]}))
    stored = request.bounded().model_dump_json()
    assert len(stored) < 1000
    assert GenerateRequest.model_validate_json(stored).received()[0].points is not None


def test_a_round_sends_points_to_its_receiver(service, proof):
    by_nonce = {record.nonce: record.points.tolist() for record in proof.records}
    with FlakyReceiver(trouble=0) as receiver:
        begin = ARTIFACTS | {"params": ASKED, "url": receiver.url}
        service.post("/init/generate", begin)
        until(lambda: receiver.taken)
        service.post("/stop", {})
        sent = [artifact for body in receiver.taken.values() for artifact in body["artifacts"]]
    known = [artifact for artifact in sent if artifact["nonce"] in by_nonce]
    assert known
    for artifact in known:
        assert artifact["vector_b64"] == ""
        assert artifact["k_points_steps"] == by_nonce[artifact["nonce"]]


def test_a_claim_keeps_points_that_it_has_as_text(proof):
    texts = [pack_points(record.points.tolist()) for record in proof.records]
    claim = Claim(proof.round, range(NONCES), texts)
    again = Claim.decode(claim.encode(), NONCES, proof.header.pipeline)
    assert (
        again.record(3, proof.header.pipeline).points.tolist() == proof.records[3].points.tolist()
    )
