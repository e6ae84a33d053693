"""The service on a real model: jobs of the presets that publish bytes give what `prove` gives."""

import base64
from pathlib import Path

import pytest

from assay.poc import HFEngine, Round, prove
from assay.poc.net.deployment import Deployment
from assay.poc.protocol.proof import describe_packing, pack_record
from assay.poc.service import Settings
from tests.poc.service.conftest import ARTIFACTS, PARAMS, Rig, Service

T = 16


def job(preset: str, count: int = 24) -> dict[str, object]:
    params = PARAMS | {"model": "small", "seq_len": T, "preset": preset}
    return ARTIFACTS | {"params": params, "nonces": list(range(count)), "wait": True}


class RealRig(Rig):
    """A deployment of the small model."""

    def __init__(self, model, *, decodes: bool = True) -> None:
        super().__init__()
        self.model, self.decodes = model, decodes

    def deployment(self) -> Deployment:
        model = self.model
        return Deployment(
            reference="small",
            digest=model.digest,
            weights=model.weights,
            dtype="float32",
            max_positions=model.max_positions,
            decodes=self.decodes,
            engine=lambda seq_len, batch_size: HFEngine(model, batch_size=batch_size, seq_len=seq_len),
        )


@pytest.mark.parametrize("preset", ["hardened", "decode-32"])
def test_jobs_give_what_prove_gives_and_find_what_is_another_nonces(preset: str, small_model, tmp_path: Path):
    service = Service(RealRig(small_model), Settings(data_dir=tmp_path, seq_len=T, allow_private_callbacks=True))
    try:
        service.wait_ready()
        reply = service.post("/generate", job(preset))
        round = Round(block_hash="block_alpha", public_key="node_A", preset=preset, seq_len=T, block_height=7)
        proof = prove(small_model, round, range(24), batch_size=4)
        wanted = {record.nonce: base64.b64encode(pack_record(record)).decode() for record in proof.records}
        artifacts = reply["artifacts"]
        assert {artifact["nonce"]: artifact["vector_b64"] for artifact in artifacts} == wanted
        assert reply["encoding"] == describe_packing(proof.header.pipeline)
        honest = service.post("/generate", job(preset) | {"validation": {"artifacts": artifacts}})
        assert (honest["n_mismatch"], honest["fraud_detected"]) == (0, False)
        lies = [dict(artifact, vector_b64=wanted[(artifact["nonce"] + 1) % 24]) for artifact in artifacts]
        caught = service.post("/generate", job(preset) | {"validation": {"artifacts": lies}})
        assert (caught["n_mismatch"], caught["fraud_detected"]) == (24, True)
    finally:
        service.close()


def test_what_an_engine_cannot_decode_is_refused(small_model, tmp_path: Path):
    service = Service(RealRig(small_model), Settings(data_dir=tmp_path / "one", seq_len=T))
    try:
        service.wait_ready()
        long = service.post("/generate", job("decode-128"), status=422)  # 144 positions, and the model has 128
        assert "144" in long["detail"]
    finally:
        service.close()
    service = Service(RealRig(small_model, decodes=False), Settings(data_dir=tmp_path / "other", seq_len=T))
    try:
        service.wait_ready()
        refused = service.post("/generate", job("decode-32"), status=409)
        assert "does not decode" in refused["detail"]
        assert "assay poc prove" in refused["do"]
    finally:
        service.close()
