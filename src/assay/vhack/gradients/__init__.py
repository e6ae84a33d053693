"""Gradients of single samples with respect to δS, of every weight matrix at once."""

from assay.vhack.gradients._batches import Encoded, context_of, encode, plan
from assay.vhack.gradients._experts import of_one_tensor
from assay.vhack.gradients._factors import Factors
from assay.vhack.gradients._fused import sample_products
from assay.vhack.gradients._per_sample import SampleGradients, per_sample_gradients
from assay.vhack.gradients._progress import Progress, stage
from assay.vhack.gradients._sharding import is_sharded, local, local_rows, processes, reshard, whole
from assay.vhack.gradients._svd import SVDCache, check_rank, factor_dtype, weight_svd
from assay.vhack.gradients._taps import delta_gradient
from assay.vhack.gradients._targets import (
    MIN_COVERAGE,
    Coverage,
    coverage,
    module_of,
    target_modules,
    tensor_digest,
    weights_digest,
)

__all__ = [
    "MIN_COVERAGE",
    "Coverage",
    "Encoded",
    "Factors",
    "Progress",
    "SVDCache",
    "SampleGradients",
    "check_rank",
    "context_of",
    "coverage",
    "delta_gradient",
    "encode",
    "factor_dtype",
    "is_sharded",
    "local",
    "local_rows",
    "module_of",
    "of_one_tensor",
    "per_sample_gradients",
    "plan",
    "processes",
    "reshard",
    "sample_products",
    "stage",
    "target_modules",
    "tensor_digest",
    "weight_svd",
    "weights_digest",
    "whole",
]
