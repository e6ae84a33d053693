"""Portable random streams: the same bits from every backend, on every machine.

:mod:`assay.streams.definition` is the page to read: the whole format, in numpy. Its twins are
written in torch for CPU and CUDA, and fused for CUDA; :func:`get_backend` finds the one for a
device. docs/streams.md explains the format and how two machines compare their streams in one line.
"""

from assay.streams.backends import BACKENDS, DTYPES, Backend, get_backend, selftest, step_seeds
from assay.streams.definition import seed32, seeds

__all__ = [
    "BACKENDS",
    "DTYPES",
    "Backend",
    "get_backend",
    "seed32",
    "seeds",
    "selftest",
    "step_seeds",
]
