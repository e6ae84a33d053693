"""Proof of Compute: prove that a model ran, and check such proofs.

A node proves a range of nonces, and a validator that knows block and key recomputes a sample of them::

    model = assay.load_model("reference:qwen3")
    agreed = Round(block_hash="…", public_key="…")
    proof = assay.poc.prove(model, agreed, nonces=range(256))
    verdict = assay.poc.verify(proof, model, expect=agreed)
"""

from assay.poc._prover import prove
from assay.poc._verifier import check_proof, judging_batch, judging_setup, verify
from assay.poc.engines import Engine, HFEngine, measure_block_factor
from assay.poc.protocol import (
    PIPELINES,
    BlockFactor,
    Build,
    DistanceRecord,
    Fingerprint,
    Footer,
    Header,
    NetworkPins,
    Pins,
    Pipeline,
    Proof,
    Record,
    Round,
    TokenRecord,
    VectorRecord,
    get_pipeline,
)
from assay.poc.verdict import Calibration, MeasuredTarget, Noise, Verdict, calibrate, default_noise, measure_r_target

__all__ = [
    "PIPELINES",
    "BlockFactor",
    "Build",
    "Calibration",
    "DistanceRecord",
    "Engine",
    "Fingerprint",
    "Footer",
    "HFEngine",
    "Header",
    "MeasuredTarget",
    "NetworkPins",
    "Noise",
    "Pins",
    "Pipeline",
    "Proof",
    "Record",
    "Round",
    "TokenRecord",
    "VectorRecord",
    "Verdict",
    "calibrate",
    "check_proof",
    "default_noise",
    "get_pipeline",
    "judging_batch",
    "judging_setup",
    "measure_block_factor",
    "measure_r_target",
    "prove",
    "verify",
]
