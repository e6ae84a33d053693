"""The name before 0.3 of :mod:`assay.poc.vllm`, which servers may still use for extension and processors until 0.4."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """Return what has this name now."""
    return getattr(import_module("assay.poc.vllm"), name)
