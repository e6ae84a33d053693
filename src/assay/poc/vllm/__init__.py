"""Proof of Compute and receipts inside vLLM.

``VLLMEngine`` starts an engine of its own. ``plugin`` is the entry point of ``vllm.endpoint_plugins`` that puts the
service into a vLLM server, and ``before_start`` that of ``vllm.general_plugins``. ``WorkerExtension`` and
``ResponseExtension`` run inside vLLM's workers, ``ProcessorV1`` and ``ProcessorV2`` inside its model runners. Nothing
here imports vLLM before it is used. docs/vllm.md describes it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.poc.vllm.engine import VLLMEngine as VLLMEngine
    from assay.poc.vllm.plugin import plugin as plugin
    from assay.poc.vllm.preflight import PluginSettings as PluginSettings
    from assay.poc.vllm.processor_v1 import ProcessorV1 as ProcessorV1
    from assay.poc.vllm.processor_v2 import ProcessorV2 as ProcessorV2
    from assay.poc.vllm.response_worker import ResponseExtension as ResponseExtension
    from assay.poc.vllm.start import before_start as before_start
    from assay.poc.vllm.worker import WorkerExtension as WorkerExtension

_PLACES = {
    "PluginSettings": "preflight",
    "ProcessorV1": "processor_v1",
    "ProcessorV2": "processor_v2",
    "ResponseExtension": "response_worker",
    "VLLMEngine": "engine",
    "WorkerExtension": "worker",
    "before_start": "start",
    "plugin": "plugin",
}

__all__ = [
    "PluginSettings",
    "ProcessorV1",
    "ProcessorV2",
    "ResponseExtension",
    "VLLMEngine",
    "WorkerExtension",
    "before_start",
    "plugin",
]


def __getattr__(name: str) -> Any:
    """Import a name on first use: ``before_start`` runs in every process of vLLM and may refuse before the rest loads."""
    if name in _PLACES:
        return getattr(importlib.import_module(f"assay.poc.vllm.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
