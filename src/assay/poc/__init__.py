"""Proof of Compute: prove that a model ran, and check such proofs.

A node proves a range of nonces, and a validator that knows block and key recomputes a sample of them::

    model = assay.load_model("reference:qwen3")
    agreed = Round(block_hash="…", public_key="…")
    proof = assay.poc.prove(model, agreed, nonces=range(256))
    verdict = assay.poc.verify(proof, model, expect=agreed)
"""

from assay.poc.engines.base import Engine
from assay.poc.engines.blocks import measure_block_factor
from assay.poc.engines.hf.engine import HFEngine
from assay.poc.protocol.blocks import BlockFactor
from assay.poc.protocol.builds import Build
from assay.poc.protocol.pins import Pins
from assay.poc.protocol.pins_file import NetworkPins
from assay.poc.protocol.pipelines import PIPELINES, Pipeline, get_pipeline
from assay.poc.protocol.proof import Proof
from assay.poc.protocol.record import DistanceRecord, Fingerprint, Footer, Header, Record, TokenRecord, VectorRecord
from assay.poc.protocol.round import Round
from assay.poc.prover import prove
from assay.poc.verdict.calibrate import calibrate
from assay.poc.verdict.calibration import Calibration
from assay.poc.verdict.judge import Verdict
from assay.poc.verdict.noise import Noise, default_noise
from assay.poc.verdict.r_target import MeasuredTarget, measure_r_target
from assay.poc.verifier import check_proof, judging_batch, judging_setup, verify

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
