"""Gradient-space hack directions: extract them from pairs, and prove that they are real."""

from assay.vhack.basis import (
    Basis,
    Origin,
    PairGradients,
    cin,
    cin_over_modules,
    extract,
    pair_gradients,
    split_pairs,
)
from assay.vhack.gradients import (
    MIN_COVERAGE,
    Coverage,
    Factors,
    SampleGradients,
    SVDCache,
    per_sample_gradients,
    target_modules,
    weight_svd,
    weights_digest,
)
from assay.vhack.pairs import Pair, Sample

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
