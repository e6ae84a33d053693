"""Proof of Compute inside vLLM: each nonce is an ordinary request of the engine that also serves chat.

``VLLMEngine`` runs an engine of its own; ``plugin`` puts the service into a vLLM server, and ``WorkerExtension`` is
what both need inside the workers. Nothing here imports vLLM before it is used. docs/vllm.md describes it.
"""

from assay.poc.engines.vllm._early import before_start
from assay.poc.engines.vllm._extension import WorkerExtension
from assay.poc.engines.vllm._flow import FlowSettings
from assay.poc.engines.vllm._gate import check_installed
from assay.poc.engines.vllm._inprocess import VLLMEngine
from assay.poc.engines.vllm._plugin import plugin

__all__ = ["FlowSettings", "VLLMEngine", "WorkerExtension", "before_start", "check_installed", "plugin"]
