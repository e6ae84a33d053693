"""Proof of Compute: prove that a model ran, and check such proofs.

model = assay.load_model("reference:qwen3")
proof = assay.poc.prove(model, Round(block_hash="…", public_key="…"), nonces=range(256))
verdict = assay.poc.verify(proof, model)
"""

from assay.poc._prover import prove
from assay.poc._verifier import verify
from assay.poc.engines import Engine, HFEngine
from assay.poc.protocol import (
    PIPELINES,
    DistanceRecord,
    Fingerprint,
    Footer,
    Header,
    Pipeline,
    Proof,
    Record,
    Round,
    VectorRecord,
    get_pipeline,
)
from assay.poc.verdict import (
    Calibration,
    MeasuredTarget,
    Noise,
    Verdict,
    calibrate,
    default_noise,
    measure_r_target,
)

__all__ = [
    "PIPELINES",
    "Calibration",
    "DistanceRecord",
    "Engine",
    "Fingerprint",
    "Footer",
    "HFEngine",
    "Header",
    "MeasuredTarget",
    "Noise",
    "Pipeline",
    "Proof",
    "Record",
    "Round",
    "VectorRecord",
    "Verdict",
    "calibrate",
    "default_noise",
    "get_pipeline",
    "measure_r_target",
    "prove",
    "verify",
]
