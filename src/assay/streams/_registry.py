"""Backends by name. Each lives in the module ``_<name>.py`` beside this one and is made by its ``create(device)``."""

from __future__ import annotations

import importlib
import re

from assay.errors import BackendUnavailable, UsageError
from assay.streams._backend import Backend

BACKENDS = ("numpy", "numba", "torch", "triton")
"""Names of the backends: the definition, the compiled CPU one, torch on CPU and CUDA, and fused CUDA kernels."""


def get_backend(name: str = "auto", device: str = "cpu") -> Backend:
    """The backend of that name on a device.

    Args:
        name: one of :data:`BACKENDS`, or ``auto``: ``numba`` on the CPU; on CUDA ``triton`` if it runs, else ``torch``.
        device: ``cpu``, ``cuda`` or ``cuda:<number>``.

    Raises:
        UsageError: an unknown name or device, or a device that the backend is not made for.
        BackendUnavailable: the backend, or its device, is not on this machine.
    """
    if name not in (*BACKENDS, "auto"):
        raise UsageError(f"backend {name!r}", wanted=f"auto or one of {', '.join(BACKENDS)}", do="choose one of these")
    device = str(device)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UsageError(f"device {device!r}", wanted="cpu, cuda or cuda:<number>", do="choose one of these")
    if name != "auto":
        return _create(name, device)
    if device == "cpu":
        return _create("numba", device)
    try:
        return _create("triton", device)
    except BackendUnavailable:
        return _create("torch", device)


def _create(name: str, device: str) -> Backend:
    try:
        module = importlib.import_module(f"assay.streams._{name}")
    except ImportError as error:
        raise BackendUnavailable(
            f"backend {name}: {error}",
            wanted=f"the packages of backend {name}; triton comes with the CUDA builds of torch",
            do="use backend auto, which takes the fastest one that is there",
        ) from error
    backend: Backend = module.create(device)
    return backend
