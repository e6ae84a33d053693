"""Proof of Compute inside vLLM: each nonce is an ordinary request of the engine that also serves chat.

``VLLMEngine`` starts an engine of its own, :mod:`assay.poc.serving` puts the service into a vLLM server, and both need
``WorkerExtension`` inside the workers. Nothing here imports vLLM before it is used. docs/vllm.md describes it."""

from assay.poc.engines.vllm._client import Client, call_workers
from assay.poc.engines.vllm._compatibility import (
    check_config,
    check_installed,
    check_several_servers,
    missing_in_runner,
    refuse_missing,
    runner_kind,
)
from assay.poc.engines.vllm._engine import (
    Inputs,
    RequestEngine,
    VLLMEngine,
    capacity,
    fingerprint_of,
    most_positions,
    runs,
)
from assay.poc.engines.vllm._extension import WorkerExtension
from assay.poc.engines.vllm._settings import EXTENSION, rounded_cache
from assay.poc.engines.vllm._starting import explained_start, fit_machine, multiply_exactly, runs_on_cpu
from assay.poc.engines.vllm._throttle import Forward, Mode, NoncePath, Throttle, ThrottleSettings
from assay.poc.engines.vllm._worker import Spans, call_before, is_first_of_group, spans

__all__ = [
    "EXTENSION",
    "Client",
    "Forward",
    "Inputs",
    "Mode",
    "NoncePath",
    "RequestEngine",
    "Spans",
    "Throttle",
    "ThrottleSettings",
    "VLLMEngine",
    "WorkerExtension",
    "call_before",
    "call_workers",
    "capacity",
    "check_config",
    "check_installed",
    "check_several_servers",
    "explained_start",
    "fingerprint_of",
    "fit_machine",
    "is_first_of_group",
    "missing_in_runner",
    "most_positions",
    "multiply_exactly",
    "refuse_missing",
    "rounded_cache",
    "runner_kind",
    "runs",
    "runs_on_cpu",
    "spans",
]
