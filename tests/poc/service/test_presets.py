"""The service on a real model: jobs of the presets that publish bytes give what `prove` gives."""

import base64
from dataclasses import replace

import pytest

from assay.poc import Round, measure_frame, prove
from assay.poc.net.deployment import Deployment
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.protocol.records import describe_packing, pack_record
from tests.poc.service.conftest import ARTIFACTS, PARAMS
from tests.usual import usual

T = 16


def job(preset: str) -> dict[str, object]:
    params = PARAMS | {
        "model": "small",
        "seq_len": T,
        "preset": preset,
        "k_dim": get_pipeline(preset).vector_size,
    }
    return ARTIFACTS | {"params": params, "nonces": list(range(24)), "wait": True}


@pytest.fixture
def real(rig, serving, small_model):
    """Run a service on the small model."""

    def run(model=small_model, **changes: object):
        made = replace(Deployment.of(model, compiled=False), reference="small", **changes)
        rig.deployment = lambda: made
        return serving(seq_len=T)

    return run


@pytest.mark.parametrize("preset", usual(["tokens-1", "hardened", "decode-32"], "tokens-1"))
def test_jobs_give_what_prove_gives_and_find_what_is_another_nonces(preset: str, real, small_model):
    if preset == "tokens-1":
        with real() as service:
            assert "without a frame" in service.post("/generate", job(preset), status=409)["detail"]
        small_model = small_model.with_frame(measure_frame(small_model))
    with real(small_model) as service:
        reply = service.post("/generate", job(preset))
        round = Round(
            block_hash="block_alpha", public_key="node_A", preset=preset, seq_len=T, block_height=7
        )
        proof = prove(small_model, round, range(24), batch_size=4)
        wanted = {
            record.nonce: base64.b64encode(pack_record(record)).decode() for record in proof.records
        }
        artifacts = reply["artifacts"]
        assert {artifact["nonce"]: artifact["vector_b64"] for artifact in artifacts} == wanted
        assert reply["encoding"] == describe_packing(proof.header.pipeline)
        honest = service.post("/generate", job(preset) | {"validation": {"artifacts": artifacts}})
        assert (honest["n_mismatch"], honest["fraud_detected"]) == (0, False)
        lies = [
            dict(artifact, vector_b64=wanted[(artifact["nonce"] + 1) % 24])
            for artifact in artifacts
        ]
        caught = service.post("/generate", job(preset) | {"validation": {"artifacts": lies}})
        judged = preset != "tokens-1"  # of which there is no law without a calibration
        assert (caught["n_mismatch"], caught["fraud_detected"]) == (24, judged)


def test_what_an_engine_cannot_decode_is_refused(real):
    with real() as service:
        long = service.post(
            "/generate", job("decode-128"), status=422
        )  # 144 positions, and the model has 128
        assert "144" in long["detail"]
    with real(decodes=False) as service:
        refused = service.post("/generate", job("decode-32"), status=409)
        assert "does not decode" in refused["detail"]
        assert "assay poc prove" in refused["do"]
