"""Attackers as real programs against the published rules, the sequential test, and the hardened preset."""

from assay.research.redteam._attacks import ATTACKS
from assay.research.redteam._experts import make_experts
from assay.research.redteam._field import ALPHA, CHECKED, PRESETS, Field, Judge, Pool, Reading, count_power, smallest
from assay.research.redteam._partial import PartialForward, Shortcut
from assay.research.redteam._run import RedteamPlan, run_redteam
from assay.research.redteam._tables import attack_table, fields, honest_errors, paying, paying_table

__all__ = [
    "ALPHA",
    "ATTACKS",
    "CHECKED",
    "PRESETS",
    "Field",
    "Judge",
    "PartialForward",
    "Pool",
    "Reading",
    "RedteamPlan",
    "Shortcut",
    "attack_table",
    "count_power",
    "fields",
    "honest_errors",
    "make_experts",
    "paying",
    "paying_table",
    "run_redteam",
    "smallest",
]
