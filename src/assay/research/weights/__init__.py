"""Trained against random weights: does training give distances their structure?"""

from assay.research.weights._weights import WeightPlan, WeightRow, run_weights, weight_rows

__all__ = [
    "WeightPlan",
    "WeightRow",
    "run_weights",
    "weight_rows",
]
