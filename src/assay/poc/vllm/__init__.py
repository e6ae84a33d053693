"""Proof of Compute and receipts inside vLLM.

``VLLMEngine`` starts an engine of its own. ``plugin`` is the entry point of
``vllm.endpoint_plugins`` that puts the service into a vLLM server, and ``before_start`` that of
``vllm.general_plugins``. ``WorkerExtension`` and ``ResponseExtension`` run inside vLLM's workers,
``ProcessorV1`` and ``ProcessorV2`` inside its model runners. Nothing here is imported before it is
used: ``before_start`` runs in every process of vLLM, and vLLM only logs an entry point that cannot
be imported, and would answer chat and prove nothing. docs/vllm.md describes it.
"""

import multiprocessing
import os
import sys
from importlib import import_module
from pathlib import Path

import lazy_loader  # type: ignore[import-untyped]

_PLACES = {
    "endpoint_plugin": ["plugin"],
    "vllm_engine": ["VLLMEngine"],
    "preflight": ["PluginSettings"],
    "processors": ["ProcessorV1", "ProcessorV2"],
    "response_worker": ["ResponseExtension"],
    "worker": ["WorkerExtension"],
}
__getattr__, __dir__, _ = lazy_loader.attach(__name__, submod_attrs=_PLACES)

__all__ = [
    "PluginSettings",
    "ResponseExtension",
    "VLLMEngine",
    "WorkerExtension",
    "before_start",
    "plugin",
]

_SERVERS = ("api_server.py", "entry.py")
"""Files that ``python -m`` runs as a server: the second one since vLLM 0.32, where the first is
deprecated.
"""


def before_start() -> None:
    """Refuse a server that could not prove, and set what float32 and responses need.

    Only the first process of a server with the plugin, or with its worker extension, is checked;
    all others are left alone.

    Raises:
        SystemExit: Exit code 1 with the refusal, or whatever vLLM's parser raises for arguments
            that it refuses itself.
    """
    if multiprocessing.parent_process() is not None:
        return
    if not (sys.argv[1:2] == ["serve"] or Path(sys.argv[0]).name in _SERVERS):
        return
    from assay.errors import AssayError, BackendUnavailable, UsageError, how_to_install
    from assay.poc.vllm.compatibility import EXTENSION, OLD_EXTENSION

    chosen = "assay" in os.environ.get("VLLM_PLUGINS", "").split(",")
    try:
        if chosen:
            # The packages of the service do not come with vLLM.
            import_module("assay.poc.net.routes")
            from assay.poc.vllm.preflight import check_server

            check_server()
        elif any(name in word for name in (EXTENSION, OLD_EXTENSION) for word in sys.argv):
            raise UsageError(
                "vLLM with the worker extension of assay and without VLLM_PLUGINS=assay",
                wanted="the plugin too: without it the server has no /api/v1/pow and proves "
                "nothing",
                do="set VLLM_PLUGINS=assay, with the names of the other plugins that you need",
            )
    except (AssayError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError):
            error = BackendUnavailable(
                f"the package {error.name} is not installed",
                wanted="the packages of the service",
                do=how_to_install("serve"),
            )
        raise SystemExit(f"assay refuses to start: {error}") from None
