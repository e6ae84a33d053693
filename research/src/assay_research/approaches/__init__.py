"""Every approach of the published table, measured; and trained against random weights."""

from assay.research.approaches._approaches import ApproachPlan, run_approaches
from assay.research.approaches._weights import WeightPlan, WeightRow, run_weights, weight_rows, weight_table

__all__ = ["ApproachPlan", "WeightPlan", "WeightRow", "run_approaches", "run_weights", "weight_rows", "weight_table"]
