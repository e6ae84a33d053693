"""The published matrix of models, modes, blocks and keys, against live services."""

from assay.research.matrix._matrix import MODES, Plan, run_matrix
from assay.research.matrix._table import PUBLISHED_LIMIT, BlockRow, Configuration, configurations

__all__ = [
    "MODES",
    "PUBLISHED_LIMIT",
    "BlockRow",
    "Configuration",
    "Plan",
    "configurations",
    "run_matrix",
]
