"""Attackers as real programs against the published rules, the sequential test, and the hardened preset."""

from assay.research.redteam._attacks import ATTACKS
from assay.research.redteam._field import CHECKED, PRESETS, Judge, Pool, count_power
from assay.research.redteam._run import RedteamPlan, run_redteam
from assay.research.redteam._tables import attack_table, fields, honest_errors, paying, paying_table

__all__ = [
    "ATTACKS",
    "CHECKED",
    "PRESETS",
    "Judge",
    "Pool",
    "RedteamPlan",
    "attack_table",
    "count_power",
    "fields",
    "honest_errors",
    "paying",
    "paying_table",
    "run_redteam",
]
