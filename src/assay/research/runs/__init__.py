"""The run store of experiments, and what all of them share."""

from assay.research.runs._plans import BLOCKS, Blocks, ExperimentPlan, check_lists
from assay.research.runs._report import Section, build_report, section
from assay.research.runs._runs import Run, RunRecords, open_run, read_run, run_folder
from assay.research.runs._spread import Spread, effective_dimension, spread_of
from assay.research.runs._states import published, state_pipeline, states

__all__ = [
    "BLOCKS",
    "Blocks",
    "ExperimentPlan",
    "Run",
    "RunRecords",
    "Section",
    "Spread",
    "build_report",
    "check_lists",
    "effective_dimension",
    "open_run",
    "published",
    "read_run",
    "run_folder",
    "section",
    "spread_of",
    "state_pipeline",
    "states",
]
