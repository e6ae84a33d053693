"""Gradient-space hack directions: extract them from pairs, and prove that they are real."""

from assay.vhack.basis.axes import cin, cin_over_modules
from assay.vhack.basis.basis import Basis, Origin
from assay.vhack.basis.extract import PairGradients, extract, pair_gradients, split_pairs
from assay.vhack.gradients.per_sample import SampleGradients, per_sample_gradients
from assay.vhack.gradients.svd import Factors, SVDCache, weight_svd
from assay.vhack.gradients.targets import MIN_COVERAGE, Coverage, target_modules, weights_digest
from assay.vhack.pairs.pairs import Pair, Sample

__all__ = [
    "MIN_COVERAGE",
    "Basis",
    "Coverage",
    "Factors",
    "Origin",
    "Pair",
    "PairGradients",
    "SVDCache",
    "Sample",
    "SampleGradients",
    "cin",
    "cin_over_modules",
    "extract",
    "pair_gradients",
    "per_sample_gradients",
    "split_pairs",
    "target_modules",
    "weight_svd",
    "weights_digest",
]
