"""Every approach of the published table, measured."""

from assay.research.approaches._approaches import APPROACHES, ApproachPlan, run_approaches

__all__ = [
    "APPROACHES",
    "ApproachPlan",
    "run_approaches",
]
