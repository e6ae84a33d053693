"""The run store of experiments, and what all of them share."""

from assay.research.runs._report import Table, build_report
from assay.research.runs._runs import (
    BLOCKS,
    Blocks,
    ExperimentPlan,
    Progress,
    RunRecords,
    measure_missing,
    open_run,
    read_run,
    run_folder,
)
from assay.research.runs._spread import Spread, spread_of
from assay.research.runs._states import published, state_pipeline, states

__all__ = [
    "BLOCKS",
    "Blocks",
    "ExperimentPlan",
    "Progress",
    "RunRecords",
    "Spread",
    "Table",
    "build_report",
    "measure_missing",
    "open_run",
    "published",
    "read_run",
    "run_folder",
    "spread_of",
    "state_pipeline",
    "states",
]
