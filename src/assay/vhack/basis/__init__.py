"""Bases of hack directions: from the gradients of pairs to axes per module, and their files."""

from assay.vhack.basis._angles import principal_angles
from assay.vhack.basis._basis import Basis, cin, cin_over_modules
from assay.vhack.basis._extract import Running, extract, load_or_extract, pair_gradients
from assay.vhack.basis._origin import Origin
from assay.vhack.basis._paired import PairGradients, basis_from_gradients
from assay.vhack.basis._split import split_pairs

__all__ = [
    "Basis",
    "Origin",
    "PairGradients",
    "Running",
    "basis_from_gradients",
    "cin",
    "cin_over_modules",
    "extract",
    "load_or_extract",
    "pair_gradients",
    "principal_angles",
    "split_pairs",
]
