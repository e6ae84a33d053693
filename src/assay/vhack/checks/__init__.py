"""Five checks whether hack directions are real: held-out data, groups kept together, exact or matched nulls."""

from assay.vhack.checks._folds import check_groups, fewest_groups
from assay.vhack.checks._guard import EQUIVALENCE, GuardItem, guard, guard_verdict
from assay.vhack.checks._judge import CHECKS, Check, CheckReport, CheckSettings, Interval, ModuleResult
from assay.vhack.checks._page import page
from assay.vhack.checks._pools import PoolReport, PoolSample, check_two_pools, read_pool
from assay.vhack.checks._ranking import check_unpaired
from assay.vhack.checks._run import check, check_gradients, too_few_groups
from assay.vhack.checks._sources import SourceCin, check_source_log, read_source_log

__all__ = [
    "CHECKS",
    "EQUIVALENCE",
    "Check",
    "CheckReport",
    "CheckSettings",
    "GuardItem",
    "Interval",
    "ModuleResult",
    "PoolReport",
    "PoolSample",
    "SourceCin",
    "check",
    "check_gradients",
    "check_groups",
    "check_source_log",
    "check_two_pools",
    "check_unpaired",
    "fewest_groups",
    "guard",
    "guard_verdict",
    "page",
    "read_pool",
    "read_source_log",
    "too_few_groups",
]
