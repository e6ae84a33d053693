"""Engines, which run the model. The prover, the verifier and the service rely only on :class:`Engine`."""

from assay.poc.engines._base import Engine, check_supported, unsupported
from assay.poc.engines._blocks import measure_block_factor, read_block_factor
from assay.poc.engines._decoding import Decoded, DecodingEngine, Draws, Replayed, decodes
from assay.poc.engines._outputs import StateEngine, make_transform, plain_outputs
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
    "Decoded",
    "DecodingEngine",
    "Draws",
    "Engine",
    "HFEngine",
    "ParallelEngine",
    "Replayed",
    "StateEngine",
    "World",
    "auto_batch",
    "be_deterministic",
    "check_supported",
    "decodes",
    "joined",
    "make_transform",
    "measure_block_factor",
    "plain_outputs",
    "processes",
    "read_block_factor",
    "unsupported",
    "worth_compiling",
]
