"""Attackers as real programs against the published rules, the sequential test, and the hardened preset."""

from assay.research.redteam._attacks import ATTACKS, Attack
from assay.research.redteam._field import CHECKED, PRESETS, Judge, Pool
from assay.research.redteam._run import RedteamPlan, run_redteam
from assay.research.redteam._tables import ATTACK_COLUMNS, attack_rows, fields, honest_errors, paying

__all__ = [
    "ATTACKS",
    "ATTACK_COLUMNS",
    "CHECKED",
    "PRESETS",
    "Attack",
    "Judge",
    "Pool",
    "RedteamPlan",
    "attack_rows",
    "fields",
    "honest_errors",
    "paying",
    "run_redteam",
]
