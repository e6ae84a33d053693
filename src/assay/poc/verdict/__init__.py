"""Verdicts: noise laws, their calibration, and the judge that tests residuals against them."""

from assay.poc.verdict.build_noise import Machine, MachineNoise
from assay.poc.verdict.calibration_file import noise_for
from assay.poc.verdict.entries import Account, AccountEvidence
from assay.poc.verdict.ledger import Ledger
from assay.poc.verdict.ledger_audit import LedgerAudit, audit_ledger
from assay.poc.verdict.life import Life
from assay.poc.verdict.machine_fit import fit_machines
from assay.poc.verdict.proof_judge import EXIT_CODES, judge, judge_residuals
from assay.poc.verdict.response_noise import ResponseNoise

__all__ = [
    "EXIT_CODES",
    "Account",
    "AccountEvidence",
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
