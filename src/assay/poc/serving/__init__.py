"""Proof of Compute inside a vLLM server that also serves chat."""

from assay.poc.serving._plugin import plugin

__all__ = [
    "plugin",
]
