"""Experiments: every table of the published documents measured again, with the noise that each number carries.

``assay poc experiment`` runs them; docs/experiments.md says what came out.
"""

from assay.poc.experiments._approaches import APPROACHES, ApproachPlan, run_approaches
from assay.poc.experiments._matrix import MODES, Plan, run_matrix
from assay.poc.experiments._matrix_table import BlockRow, Configuration, configurations
from assay.poc.experiments._report import Section, build_report, section
from assay.poc.experiments._runs import Run, RunRecords, open_run, read_run, run_folder
from assay.poc.experiments._spread import Spread, effective_dimension, spread_of
from assay.poc.experiments._weights import WeightPlan, WeightRow, run_weights, weight_rows

__all__ = [
    "APPROACHES",
    "MODES",
    "ApproachPlan",
    "BlockRow",
    "Configuration",
    "Plan",
    "Run",
    "RunRecords",
    "Section",
    "Spread",
    "WeightPlan",
    "WeightRow",
    "build_report",
    "configurations",
    "effective_dimension",
    "open_run",
    "read_run",
    "run_approaches",
    "run_folder",
    "run_matrix",
    "run_weights",
    "section",
    "spread_of",
    "weight_rows",
]
