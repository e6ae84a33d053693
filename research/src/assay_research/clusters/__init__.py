"""Every rule side by side on nonces that real clusters published: honest machines left out, and cheats."""

from assay.research.clusters._builds import Build, Pair, builds_of, sound_builds
from assay.research.clusters._clusters import ClusterPlan, run_clusters, run_name_of
from assay.research.clusters._folds import Fold, folds_of
from assay.research.clusters._rules import CountRule, Oracle
from assay.research.clusters._summary import (
    HONEST,
    REAL,
    SIMULATED,
    cheat_table,
    fault_table,
    honest_table,
    model_table,
    summarise,
)

__all__ = [
    "HONEST",
    "REAL",
    "SIMULATED",
    "Build",
    "ClusterPlan",
    "CountRule",
    "Fold",
    "Oracle",
    "Pair",
    "builds_of",
    "cheat_table",
    "fault_table",
    "folds_of",
    "honest_table",
    "model_table",
    "run_clusters",
    "run_name_of",
    "sound_builds",
    "summarise",
]
