"""Proof of Compute inside a vLLM server that also serves chat.

``plugin`` is the entry point of ``vllm.endpoint_plugins``, ``before_start`` that of ``vllm.general_plugins``.
"""

from typing import TYPE_CHECKING, Any

from assay.poc.serving._start import before_start

if TYPE_CHECKING:
    from assay.poc.serving._plugin import plugin as plugin
    from assay.poc.serving._preflight import PluginSettings as PluginSettings

__all__ = [
    "PluginSettings",
    "before_start",
    "plugin",
]


def __getattr__(name: str) -> Any:
    """Import what needs the packages of the service on first use, so that ``before_start`` can refuse without them."""
    if name == "plugin":
        from assay.poc.serving._plugin import plugin

        return plugin
    if name == "PluginSettings":
        from assay.poc.serving._preflight import PluginSettings

        return PluginSettings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
