"""Portable random streams: the same bits from every backend, on every machine.

:mod:`assay.streams.definition` is the page to read: the whole format, in numpy. Its twins are
written in torch for CPU and CUDA, and fused for CUDA; :func:`get_backend` finds the one for a
device. docs/streams.md explains the format, and how two machines compare their streams in one line.
"""

from assay.streams.arrays import DTYPES, as_tensor, digest
from assay.streams.backends import BACKENDS, Backend, get_backend, step_seeds
from assay.streams.definition import seed32, seeds
from assay.streams.self_test import SELFTEST_EXPECTED, selftest

__all__ = [
    "BACKENDS",
    "DTYPES",
    "SELFTEST_EXPECTED",
    "Backend",
    "as_tensor",
    "digest",
    "get_backend",
    "seed32",
    "seeds",
    "selftest",
    "step_seeds",
]
