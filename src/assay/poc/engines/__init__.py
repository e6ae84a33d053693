"""Engines: what runs the model. The prover and the verifier know only :class:`Engine`."""

from assay.poc.engines._base import Engine as Engine
from assay.poc.engines._base import Fingerprint as Fingerprint
from assay.poc.engines._base import TransformingEngine as TransformingEngine
from assay.poc.engines._hf import HFEngine as HFEngine

__all__ = ["Engine", "Fingerprint", "HFEngine", "TransformingEngine"]
