"""Proof of Compute inside vLLM: each nonce is an ordinary request of the engine that also serves chat.

``VLLMEngine`` starts an engine of its own, :mod:`assay.poc.serving` puts the service into a vLLM server, and both need
``WorkerExtension`` inside the workers. Nothing here imports vLLM before it is used. docs/vllm.md describes it."""

from assay.poc.engines.vllm._client import Client
from assay.poc.engines.vllm._compatibility import (
    EXTENSION,
    check_config,
    check_engines,
    check_installed,
    multiply_exactly,
)
from assay.poc.engines.vllm._engine import Inputs, RequestEngine, VLLMEngine, capacity, most_positions
from assay.poc.engines.vllm._extension import WorkerExtension
from assay.poc.engines.vllm._throttle import Mode, Throttle, ThrottleSettings

__all__ = [
    "EXTENSION",
    "Client",
    "Inputs",
    "Mode",
    "RequestEngine",
    "Throttle",
    "ThrottleSettings",
    "VLLMEngine",
    "WorkerExtension",
    "capacity",
    "check_config",
    "check_engines",
    "check_installed",
    "most_positions",
    "multiply_exactly",
]
