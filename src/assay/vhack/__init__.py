"""Gradient-space hack directions: extract them from pairs, and prove that they are real."""

from assay.vhack._angles import principal_angles
from assay.vhack._basis import Basis, cin, cin_over_modules
from assay.vhack._digest import weights_digest
from assay.vhack._extract import extract, load_or_extract, pair_gradients
from assay.vhack._gradients import per_sample_gradients
from assay.vhack._origin import Origin
from assay.vhack._paired import PairGradients, basis_from_gradients
from assay.vhack._split import split_pairs
from assay.vhack._svd import Factors
from assay.vhack._svd_cache import SVDCache, default_cache, weight_svd
from assay.vhack._targets import target_modules
from assay.vhack._types import Pair, Sample

__all__ = [
    "Basis",
    "Factors",
    "Origin",
    "Pair",
    "PairGradients",
    "SVDCache",
    "Sample",
    "basis_from_gradients",
    "cin",
    "cin_over_modules",
    "default_cache",
    "extract",
    "load_or_extract",
    "pair_gradients",
    "per_sample_gradients",
    "principal_angles",
    "split_pairs",
    "target_modules",
    "weight_svd",
    "weights_digest",
]
