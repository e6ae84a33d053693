"""Engines: what runs the model. The prover and the verifier know only :class:`Engine`."""

from assay.poc.engines._base import Engine as Engine
from assay.poc.engines._base import Fingerprint as Fingerprint
from assay.poc.engines._base import TransformingEngine as TransformingEngine
from assay.poc.engines._compiled import worth_compiling as worth_compiling
from assay.poc.engines._deterministic import be_deterministic as be_deterministic
from assay.poc.engines._hf import HFEngine as HFEngine
from assay.poc.engines._memory import auto_batch as auto_batch
from assay.poc.engines._outputs import make_transform as make_transform
from assay.poc.engines._parallel import ParallelEngine as ParallelEngine
from assay.poc.engines._parallel import World as World
from assay.poc.engines._parallel import joined as joined
from assay.poc.engines._parallel import processes as processes

__all__ = [
    "Engine",
    "Fingerprint",
    "HFEngine",
    "ParallelEngine",
    "TransformingEngine",
    "World",
    "auto_batch",
    "be_deterministic",
    "joined",
    "make_transform",
    "processes",
    "worth_compiling",
]
