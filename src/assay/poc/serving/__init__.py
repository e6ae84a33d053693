"""Proof of Compute inside a vLLM server that also serves chat.

``plugin`` is the entry point of ``vllm.endpoint_plugins``, ``before_start`` that of ``vllm.general_plugins``.
"""

from assay.poc.serving._plugin import plugin
from assay.poc.serving._preflight import PluginSettings, before_start

__all__ = [
    "PluginSettings",
    "before_start",
    "plugin",
]
