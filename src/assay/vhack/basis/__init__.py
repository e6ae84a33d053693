"""Bases of hack directions: from the gradients of pairs to axes per module, and their files."""

from assay.vhack.basis._axes import METHODS, cin, cin_over_modules, shrinkage
from assay.vhack.basis._basis import Basis, Origin
from assay.vhack.basis._extract import extract, pair_gradients, select_pairs, split_pairs
from assay.vhack.basis._paired import PairGradients

__all__ = [
    "METHODS",
    "Basis",
    "Origin",
    "PairGradients",
    "cin",
    "cin_over_modules",
    "extract",
    "pair_gradients",
    "select_pairs",
    "shrinkage",
    "split_pairs",
]
