"""Decoding in the service: the same tokens as `prove`, and verdicts on those of others."""

import base64
from dataclasses import replace
from pathlib import Path

from assay.poc import Proof, Round, prove
from assay.poc.net.deployment import Deployment
from assay.poc.protocol.record import describe_packing, pack_record
from assay.poc.service import Settings
from tests.poc.service.conftest import ARTIFACTS, PARAMS, Service
from tests.poc.test_hardened_service import RealRig

T, PRESET = 16, "decode-32"
JOB = ARTIFACTS | {
    "params": PARAMS | {"model": "small", "seq_len": T, "preset": PRESET},
    "nonces": [0, 1, 2, 5],
    "wait": True,
}


class DecodingRig(RealRig):
    """A deployment of the small model on an engine that decodes."""

    decodes = True

    def deployment(self) -> Deployment:
        return replace(super().deployment(), decodes=self.decodes)


def texts(proof: Proof) -> dict[int, str]:
    return {record.nonce: base64.b64encode(pack_record(record)).decode() for record in proof.records}


def with_tokens(proof: Proof, change) -> Proof:
    records = [replace(record, tokens=change(record.tokens)) for record in proof.records]
    return Proof.build(proof.header, records, proof.footer.seconds)


def test_jobs_of_the_service(small_model, tmp_path: Path):
    rig = DecodingRig(small_model)
    service = Service(rig, Settings(data_dir=tmp_path, seq_len=T, allow_private_callbacks=True))
    try:
        service.wait_ready()
        reply = service.post("/generate", JOB)
        round = Round(block_hash="block_alpha", public_key="node_A", preset=PRESET, seq_len=T, block_height=7)
        proof = prove(small_model, round, JOB["nonces"], batch_size=4)
        assert {artifact["nonce"]: artifact["vector_b64"] for artifact in reply["artifacts"]} == texts(proof)
        assert reply["encoding"] == describe_packing(proof.header.pipeline)
        many = JOB | {"nonces": list(range(24))}
        artifacts = service.post("/generate", many)["artifacts"]
        honest = service.post("/generate", many | {"validation": {"artifacts": artifacts}})
        assert (honest["n_mismatch"], honest["fraud_detected"]) == (0, False)
        assert honest["residual_test"]["verdict"] != "fraud"
        turned = with_tokens(prove(small_model, round, range(24), batch_size=4), lambda tokens: tokens[::-1].copy())
        lies = [{"nonce": nonce, "vector_b64": text} for nonce, text in texts(turned).items()]
        caught = service.post("/generate", many | {"validation": {"artifacts": lies}})
        assert (caught["n_mismatch"], caught["fraud_detected"]) == (24, True)
        long = JOB | {"params": JOB["params"] | {"preset": "decode-128"}}  # 144 positions, and the model has 128
        assert "144" in service.post("/generate", long, status=422)["detail"]
    finally:
        service.close()


def test_a_service_whose_engine_does_not_decode_says_so(small_model, tmp_path: Path):
    rig = DecodingRig(small_model)
    rig.decodes = False
    service = Service(rig, Settings(data_dir=tmp_path, seq_len=T))
    try:
        service.wait_ready()
        refused = service.post("/generate", JOB, status=409)
        assert "does not decode" in refused["detail"]
        assert "assay poc prove" in refused["do"]
    finally:
        service.close()
