"""Backends by name: ``<Name>Backend`` in the module ``_<name>.py`` beside this one, and the definition in numpy."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping

from assay.errors import BackendUnavailable, UsageError
from assay.streams._arrays import DTYPES, digest
from assay.streams._backend import Backend
from assay.streams._definition import seeds

BACKENDS = ("numpy", "numba", "torch", "triton")
"""Names of the backends: the definition, the compiled CPU one, torch on CPU and CUDA, and fused CUDA kernels."""


def get_backend(name: str = "auto", device: str = "cpu") -> Backend:
    """Return the backend of that name on a device.

    Args:
        name: One of :data:`BACKENDS`, or ``auto``: ``numba`` on the CPU; on CUDA ``triton`` if it runs, else ``torch``.
        device: ``cpu``, ``cuda`` or ``cuda:<number>``.

    Raises:
        UsageError: An unknown name or device, or a device that the backend is not made for.
        BackendUnavailable: The backend, or its device, is not on this machine.
    """
    if name not in (*BACKENDS, "auto"):
        raise UsageError(f"backend {name!r}", wanted=f"auto or one of {', '.join(BACKENDS)}", do="choose one of these")
    device = str(device)
    # Torch reads a number that it cannot hold as another one, or not at all.
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", device):
        raise UsageError(f"device {device!r}", wanted="cpu, cuda or cuda:<number>", do="choose one of these")
    if name in ("numpy", "numba") and device != "cpu":
        raise UsageError(
            f"backend {name} on device {device!r}", wanted="device cpu", do="use backend torch or auto there"
        )
    if name != "auto":
        return _create(name, device)
    if device == "cpu":
        return _create("numba", device)
    try:
        return _create("triton", device)
    except BackendUnavailable:
        return _create("torch", device)


def _create(name: str, device: str) -> Backend:
    if name == "numpy":
        return Backend(device)
    try:
        module = importlib.import_module(f"assay.streams._{name}")
    except ImportError as error:
        raise BackendUnavailable(
            f"backend {name}: {error}",
            wanted=f"the packages of backend {name}; triton comes with the CUDA builds of torch",
            do="use backend auto, which takes the fastest one that is there",
        ) from error
    backend: Backend = getattr(module, f"{name.capitalize()}Backend")(device)
    return backend


_TEXTS = [f"assay_selftest_{i}" for i in range(3)]
_N, _LARGE_N = 4097, 65537

SELFTEST_EXPECTED: Mapping[str, str] = {
    "hash": "23d018db47fab4326aa227a8c8a2a60734e8498506263145814a2a8da0695778",
    "uniform": "3f05a304d08f386ac5f37a8d2d3b2a26d4e445258af6313adf4886b5ef8530e8",
    "signs": "831ed7e5b7a2474d677b999b72a02eb05a523c92e1661d92a19e5db073470a4c",
    "permutation": "dd69ead6e84da1ffa6d70af372d4d913869e50c3a2568bd6c4c6b20da7ad3108",
    "pick 12": "f30de919f7b75f693d23aa734440224d260b94fb5631fac27c5c54dfdcccb86c",
    "gumbel": "261f9128b224efefbc9211d091d99ab64d0633f022131ea6f8219c8adaf0bd76",
    "normal float32": "188011b514762ed49cc6159ff404f1bfb20c4979d161c8ee4c90a4ad55c6ee8f",
    "normal float32 strength 256": "0b04710f9c4a0553053268fe6a9635d4538458340e30400aaa3902aef7472757",
    "normal float16": "ff7a53c089f10b5545f4c17618f5a944943febb7c755b5b8ea5fdf714c93571a",
    "normal float16 strength 256": "85799d51e221c62088cc1e1ecb90f084e4c036eb3e6928ca1f38d80b54905d01",
    "normal bfloat16": "dbaaa7594a4bc1f9a21b1e6bd5c4299fb3bbebedf7c0b550d5e28532cc1de3d7",
    "normal bfloat16 strength 256": "9ae6f63322b581edc4a157e74f9fbdd6536290bea082094db162e3dfe2a42096",
}
"""What :func:`selftest` returns on a machine that computes the streams as defined (made with the numpy definition)."""


def selftest(backend: Backend) -> dict[str, str]:
    """Return SHA-256 of three streams of every kind and dtype, by name: :data:`SELFTEST_EXPECTED` if all is right.

    Raises:
        OutOfMemory: There is no room for a megabyte.
    """
    plain, strong = seeds(_TEXTS), seeds(_TEXTS, strength=256)
    streams = {
        "hash": backend.hashes(plain, _N),
        "uniform": backend.uniforms(plain, _N),
        "signs": backend.signs(plain, _N),
        "permutation": backend.permutations(plain, _N),
        "pick 12": backend.picks(plain, _N, 12),
        "gumbel": backend.gumbels(plain, _LARGE_N),
    }
    for dtype in DTYPES:
        streams[f"normal {dtype}"] = backend.normals(plain, _LARGE_N, dtype)
        streams[f"normal {dtype} strength 256"] = backend.normals(strong, _N, dtype)
    return {name: digest(stream) for name, stream in streams.items()}
