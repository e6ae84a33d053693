"""Proof of Compute: prove that a model ran, and check such proofs.

model = assay.load_model("reference:qwen3")
proof = assay.poc.prove(model, Round(block_hash="…", public_key="…"), nonces=range(256))
verdict = assay.poc.verify(proof, model)
"""

from assay.poc._calibration import Calibration, calibrate
from assay.poc._noise import Noise, default_noise
from assay.poc._pipelines import PIPELINES, Pipeline, get_pipeline
from assay.poc._proof import Footer, Header, Proof, Record
from assay.poc._prover import prove
from assay.poc._round import Round
from assay.poc._rtarget import MeasuredTarget, measure_r_target
from assay.poc._verdict import Verdict
from assay.poc._verifier import verify
from assay.poc.engines import Engine, Fingerprint, HFEngine

__all__ = [
    "PIPELINES",
    "Calibration",
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
    "Verdict",
    "calibrate",
    "default_noise",
    "get_pipeline",
    "measure_r_target",
    "prove",
    "verify",
]
