"""Responses of a vLLM server: seeded sampling in its workers, and a receipt of every response.

``Recorder`` wraps the engine client of the server, ``ResponseExtension`` keeps the sketches in the workers, and one of
``ProcessorV1`` and ``ProcessorV2`` chooses the tokens there, by the model runner that the engine has. Nothing here
imports vLLM before it is used. docs/vllm.md describes it."""

from typing import Any

from assay.poc.responses.vllm._beacon import Beacon
from assay.poc.responses.vllm._carried import keeping_states
from assay.poc.responses.vllm._extension import ResponseExtension
from assay.poc.responses.vllm._recorder import ACCEPTED, Accepted, ReceiptSink, Recorder
from assay.poc.responses.vllm._refusals import EXTENSION, Mode, check_responses, processor_for

__all__ = [
    "ACCEPTED",
    "EXTENSION",
    "Accepted",
    "Beacon",
    "Mode",
    "ReceiptSink",
    "Recorder",
    "ResponseExtension",
    "check_responses",
    "keeping_states",
    "processor_for",
]


def __getattr__(name: str) -> Any:
    """Import a processor, which needs vLLM, when it is asked for: vLLM does so by its name."""
    if name == "ProcessorV1":
        from assay.poc.responses.vllm._v1 import ProcessorV1

        return ProcessorV1
    if name == "ProcessorV2":
        from assay.poc.responses.vllm._v2 import ProcessorV2

        return ProcessorV2
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
