"""The published matrix of models, modes, blocks and keys, against live services."""

from assay.research.matrix._matrix import MODES, Plan, run_matrix
from assay.research.matrix._table import (
    PUBLISHED_LIMIT,
    Configuration,
    configurations,
    rate_table,
    spread_table,
    throughput_table,
)

__all__ = [
    "MODES",
    "PUBLISHED_LIMIT",
    "Configuration",
    "Plan",
    "configurations",
    "rate_table",
    "run_matrix",
    "spread_table",
    "throughput_table",
]
