"""The service on a real model with the hardened preset: its jobs give the vectors that `prove` gives."""

from pathlib import Path

from assay.poc import HFEngine, Round, prove
from assay.poc.net.deployment import Deployment
from assay.poc.protocol.record import encode_vector
from assay.poc.service import Settings
from tests.poc.service.conftest import ARTIFACTS, PARAMS, Rig, Service

T = 16
JOB = ARTIFACTS | {
    "params": PARAMS | {"model": "small", "seq_len": T, "preset": "hardened"},
    "nonces": [0, 1, 2, 5],
    "wait": True,
}


class RealRig(Rig):
    """A deployment of the small model."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def deployment(self) -> Deployment:
        model = self.model
        return Deployment(
            reference="small",
            digest=model.digest,
            weights=model.weights,
            dtype="float32",
            max_positions=model.max_positions,
            engine=lambda seq_len, batch_size: HFEngine(model, batch_size=batch_size, seq_len=seq_len),
        )


def test_artifact_jobs_of_the_hardened_preset(small_model, tmp_path: Path):
    service = Service(RealRig(small_model), Settings(data_dir=tmp_path, seq_len=T, allow_private_callbacks=True))
    try:
        service.wait_ready()
        artifacts = service.post("/generate", JOB)["artifacts"]
        round = Round(block_hash="block_alpha", public_key="node_A", preset="hardened", seq_len=T, block_height=7)
        proof = prove(small_model, round, JOB["nonces"], batch_size=4)
        expected = {record.nonce: encode_vector(record.vector) for record in proof.records}
        assert {artifact["nonce"]: artifact["vector_b64"] for artifact in artifacts} == expected
        honest = service.post("/generate", JOB | {"validation": {"artifacts": artifacts}})
        assert (honest["n_mismatch"], honest["fraud_detected"]) == (0, False)
        swapped = [dict(artifacts[0], nonce=0)] + [dict(artifacts[0], nonce=a["nonce"]) for a in artifacts[1:]]
        assert service.post("/generate", JOB | {"validation": {"artifacts": swapped}})["n_mismatch"] == 3
    finally:
        service.close()
