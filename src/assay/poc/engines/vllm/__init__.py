"""Proof of Compute inside vLLM: each nonce is an ordinary request of the engine that also serves chat.

``VLLMEngine`` runs an engine of its own; ``plugin`` puts the service into a vLLM server, and ``WorkerExtension`` is
what both need inside the workers. Nothing here imports vLLM before it is used. docs/vllm.md describes it."""

from assay.poc.engines.vllm._client import Client
from assay.poc.engines.vllm._compatibility import check_config, check_installed
from assay.poc.engines.vllm._engine import Inputs, RequestEngine, capacity, most_positions
from assay.poc.engines.vllm._extension import WorkerExtension
from assay.poc.engines.vllm._inprocess import VLLMEngine
from assay.poc.engines.vllm._preflight import before_start, check_alone
from assay.poc.engines.vllm._throttle import Flow, FlowSettings

__all__ = [
    "Client",
    "Flow",
    "FlowSettings",
    "Inputs",
    "RequestEngine",
    "VLLMEngine",
    "WorkerExtension",
    "before_start",
    "capacity",
    "check_alone",
    "check_config",
    "check_installed",
    "most_positions",
]
