"""Attackers as real programs against the published rules, the sequential test, and the hardened preset."""

from assay.poc.experiments.redteam._attacks import ATTACKS, Attack
from assay.poc.experiments.redteam._detect import CHECKED, Judge, Pool
from assay.poc.experiments.redteam._page import draw
from assay.poc.experiments.redteam._run import RedteamPlan, run_redteam
from assay.poc.experiments.redteam._tables import ATTACK_COLUMNS, attack_rows, paying

__all__ = [
    "ATTACKS",
    "ATTACK_COLUMNS",
    "CHECKED",
    "Attack",
    "Judge",
    "Pool",
    "RedteamPlan",
    "attack_rows",
    "draw",
    "paying",
    "run_redteam",
]
