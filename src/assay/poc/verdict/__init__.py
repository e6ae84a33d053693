"""Verdicts: how far honest engines differ, how that is calibrated, and the judge that holds residuals against it."""

from assay.poc.verdict._calibration import (
    Calibration,
    calibrate,
    fit_noise,
    noise_for,
)
from assay.poc.verdict._judge import (
    COUNT_ALPHA,
    DIST_THRESHOLD,
    EFFECT,
    MARGIN,
    P_FLIP,
    P_MISMATCH,
    Law,
    Noise,
    Verdict,
    count_mismatches,
    default_noise,
    judge,
    law_as_dict,
    published_rule,
    residuals,
    sequential_test,
)
from assay.poc.verdict._ledger import Ledger
from assay.poc.verdict._ledger_audit import Fault, LedgerAudit
from assay.poc.verdict._ledger_entries import Account, Entry, Standing, Update, round_identity
from assay.poc.verdict._ledger_files import audit_ledger
from assay.poc.verdict._ledger_merge import LedgerShare, MergedStanding, merge_ledgers
from assay.poc.verdict._life import Evidence, Life
from assay.poc.verdict._pinned import pinned_calibration
from assay.poc.verdict._targets import MeasuredTarget, distances_from, measure_r_target

__all__ = [
    "COUNT_ALPHA",
    "DIST_THRESHOLD",
    "EFFECT",
    "MARGIN",
    "P_FLIP",
    "P_MISMATCH",
    "Account",
    "Calibration",
    "Entry",
    "Evidence",
    "Fault",
    "Law",
    "Ledger",
    "LedgerAudit",
    "LedgerShare",
    "Life",
    "MeasuredTarget",
    "MergedStanding",
    "Noise",
    "Standing",
    "Update",
    "Verdict",
    "audit_ledger",
    "calibrate",
    "count_mismatches",
    "default_noise",
    "distances_from",
    "fit_noise",
    "judge",
    "law_as_dict",
    "measure_r_target",
    "merge_ledgers",
    "noise_for",
    "pinned_calibration",
    "published_rule",
    "residuals",
    "round_identity",
    "sequential_test",
]
