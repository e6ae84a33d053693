"""Five checks whether hack directions are real: held-out data, groups kept together, exact or matched nulls."""

from assay.vhack.checks.judge import CheckReport, CheckSettings
from assay.vhack.checks.pools import PoolReport, check_two_pools, read_pool
from assay.vhack.checks.run import check, check_gradients

__all__ = ["CheckReport", "CheckSettings", "PoolReport", "check", "check_gradients", "check_two_pools", "read_pool"]
