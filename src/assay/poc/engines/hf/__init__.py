"""The engine on transformers: the definition, and the default on CPU and CUDA."""

from assay.poc.engines.hf._compiled import LeanForward, RecordedPasses, worth_compiling
from assay.poc.engines.hf._engine import HFEngine, be_deterministic, is_compiled
from assay.poc.engines.hf._lean import LayerWeights, LeanParts, Shape, rotation_of
from assay.poc.engines.hf._memory import auto_batch, check_shape
from assay.poc.engines.hf._parallel import ParallelEngine, World, joined, processes

__all__ = [
    "HFEngine",
    "LayerWeights",
    "LeanForward",
    "LeanParts",
    "ParallelEngine",
    "RecordedPasses",
    "Shape",
    "World",
    "auto_batch",
    "be_deterministic",
    "check_shape",
    "is_compiled",
    "joined",
    "processes",
    "rotation_of",
    "worth_compiling",
]
