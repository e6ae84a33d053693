"""Gradient-space hack directions: extract them from pairs, and prove that they are real."""

from assay.vhack._angles import principal_angles
from assay.vhack._basis import Basis, cin, cin_over_modules
from assay.vhack._origin import Origin
from assay.vhack._paired import PairGradients, basis_from_gradients
from assay.vhack._types import Pair, Sample

__all__ = [
    "Basis",
    "Origin",
    "Pair",
    "PairGradients",
    "Sample",
    "basis_from_gradients",
    "cin",
    "cin_over_modules",
    "principal_angles",
]
