"""Verdicts: how far honest engines differ, how that is calibrated, and the judge that holds
residuals against it.
"""

from assay.poc.verdict.calibration import Machine, MachineNoise, fit_machines, noise_for
from assay.poc.verdict.judge import EXIT_CODES, judge, judge_residuals
from assay.poc.verdict.ledger import Ledger, LedgerAudit, audit_ledger
from assay.poc.verdict.life import Account, Evidence, Life
from assay.poc.verdict.noise import ResponseNoise

__all__ = [
    "EXIT_CODES",
    "Account",
    "Evidence",
    "Ledger",
    "LedgerAudit",
    "Life",
    "Machine",
    "MachineNoise",
    "ResponseNoise",
    "audit_ledger",
    "fit_machines",
    "judge",
    "judge_residuals",
    "noise_for",
]
