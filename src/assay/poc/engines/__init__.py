"""Engines run the model. The prover and the verifier know only :class:`Engine`."""

from assay.poc.engines._base import Engine, TransformingEngine
from assay.poc.engines._outputs import make_transform, plain_outputs
from assay.poc.engines.hf import (
    HFEngine,
    ParallelEngine,
    World,
    auto_batch,
    be_deterministic,
    joined,
    processes,
    worth_compiling,
)

__all__ = [
    "Engine",
    "HFEngine",
    "ParallelEngine",
    "TransformingEngine",
    "World",
    "auto_batch",
    "be_deterministic",
    "joined",
    "make_transform",
    "plain_outputs",
    "processes",
    "worth_compiling",
]
