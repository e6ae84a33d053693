"""Five checks whether hack directions are real: held-out data, groups kept together, exact or matched nulls."""

from assay.vhack.checks.five_checks import check, check_gradients
from assay.vhack.checks.judge import CheckReport, CheckSettings
from assay.vhack.checks.pools import PoolReport, check_two_pools, read_pool

__all__ = ["CheckReport", "CheckSettings", "PoolReport", "check", "check_gradients", "check_two_pools", "read_pool"]
