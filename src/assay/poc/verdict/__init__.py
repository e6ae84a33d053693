"""Verdicts: how far honest engines differ, how that is calibrated, and the judge that holds residuals against it."""

from assay.poc.verdict._build_noise import BuildNoise, Machine, fit_noise, fitted_noise
from assay.poc.verdict._calibrate import SCALED_SPREAD, calibrate, calibrate_vectors
from assay.poc.verdict._calibration import Calibration, noise_for
from assay.poc.verdict._judge import (
    COUNT_ALPHA,
    DIST_THRESHOLD,
    EXIT_CODES,
    P_FLIP,
    P_MISMATCH,
    Outcome,
    Verdict,
    count_mismatches,
    judge,
    judge_residuals,
    positions_of,
    published_rule,
    residuals,
)
from assay.poc.verdict._ledger import Ledger, check_ledger
from assay.poc.verdict._ledger_audit import Fault, LedgerAudit
from assay.poc.verdict._ledger_entries import (
    FAULTY,
    RESPONSES,
    Account,
    Entry,
    Standing,
    Update,
    response_identity,
    round_identity,
)
from assay.poc.verdict._ledger_files import audit_ledger
from assay.poc.verdict._ledger_merge import LedgerShare, MergedStanding, merge_ledgers
from assay.poc.verdict._life import EPOCH, Evidence, Life, share_of_test
from assay.poc.verdict._machines import (
    PAIR_SPREAD,
    PRIOR,
    LeftOut,
    MachineNoise,
    effect_from_power,
    fit_machines,
    leave_out,
)
from assay.poc.verdict._noise import EFFECT, MARGIN, Law, Noise, default_noise, law_as_dict, sequential_test
from assay.poc.verdict._pinned import noise_of_build, pinned_calibration
from assay.poc.verdict._response_noise import (
    AnyNoise,
    PartNoise,
    ResponseBlocks,
    ResponseNoise,
    ResponseResult,
    ResponseTest,
)
from assay.poc.verdict._targets import MeasuredTarget, distances_from, measure_r_target
from assay.poc.verdict._vector_sets import VectorSet, machine_kind, read_vector_sets

__all__ = [
    "COUNT_ALPHA",
    "DIST_THRESHOLD",
    "EFFECT",
    "EPOCH",
    "EXIT_CODES",
    "FAULTY",
    "MARGIN",
    "PAIR_SPREAD",
    "PRIOR",
    "P_FLIP",
    "P_MISMATCH",
    "RESPONSES",
    "SCALED_SPREAD",
    "Account",
    "AnyNoise",
    "BuildNoise",
    "Calibration",
    "Entry",
    "Evidence",
    "Fault",
    "Law",
    "Ledger",
    "LedgerAudit",
    "LedgerShare",
    "LeftOut",
    "Life",
    "Machine",
    "MachineNoise",
    "MeasuredTarget",
    "MergedStanding",
    "Noise",
    "Outcome",
    "PartNoise",
    "ResponseBlocks",
    "ResponseNoise",
    "ResponseResult",
    "ResponseTest",
    "Standing",
    "Update",
    "VectorSet",
    "Verdict",
    "audit_ledger",
    "calibrate",
    "calibrate_vectors",
    "check_ledger",
    "count_mismatches",
    "default_noise",
    "distances_from",
    "effect_from_power",
    "fit_machines",
    "fit_noise",
    "fitted_noise",
    "judge",
    "judge_residuals",
    "law_as_dict",
    "leave_out",
    "machine_kind",
    "measure_r_target",
    "merge_ledgers",
    "noise_for",
    "noise_of_build",
    "pinned_calibration",
    "positions_of",
    "published_rule",
    "read_vector_sets",
    "residuals",
    "response_identity",
    "round_identity",
    "sequential_test",
    "share_of_test",
]
