"""Portable random streams: the same bits from every backend, on every machine.

:mod:`assay.streams._definition` is the page to read: the whole format, in numpy. Its twins are compiled for the CPU,
written in torch for CPU and CUDA, and fused for CUDA; :func:`get_backend` finds the one for a device. docs/streams.md
explains the format and how two machines compare their streams in one line.
"""

from assay.streams._arrays import DTYPES, STORED_DTYPES, as_tensor, digest, dtype_name, torch_dtype
from assay.streams._backend import Backend, step_seeds
from assay.streams._definition import seed32, seeds
from assay.streams._registry import BACKENDS, SELFTEST_EXPECTED, get_backend, selftest

__all__ = [
    "BACKENDS",
    "DTYPES",
    "SELFTEST_EXPECTED",
    "STORED_DTYPES",
    "Backend",
    "as_tensor",
    "digest",
    "dtype_name",
    "get_backend",
    "seed32",
    "seeds",
    "selftest",
    "step_seeds",
    "torch_dtype",
]
