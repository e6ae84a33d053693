"""What is refused of a proof without its model, and the records that are recomputed."""

from dataclasses import replace

import numpy as np

from assay.errors import ProofMismatch, UsageError
from assay.poc.protocol.distinct_seeds import check_distinct_seeds
from assay.poc.protocol.pins import FORMATS, Pins
from assay.poc.protocol.proof import Proof
from assay.poc.protocol.records import Record
from assay.poc.protocol.round import Round
from assay.poc.verdict.calibration_file import Calibration
from assay.poc.verdict.sample_plan import LARGEST_SAMPLE


def check_proof(
    proof: Proof,
    *,
    expect: Pins | Round | None = None,
    sample: int | None = None,
    calibration: Calibration | None = None,
) -> Pins:
    """Check a proof without its model, and return its pins; arguments as for `verify`.

    :func:`verify` begins with this. To call it before a model is loaded saves the time for proofs
    that are refused.

    Raises:
        ProofMismatch: The header contradicts ``expect`` or names a number format that this version
            does not know, or nonces have colliding input seeds.
        UsageError: The sample is larger than the proof, or an expected value is out of range.
        CalibrationError: The calibration is of another model, preset or engine than the prover's.
    """
    header = proof.header
    if header.fingerprint.dtype not in FORMATS:
        raise ProofMismatch(
            f"a proof in the number format {header.fingerprint.dtype!r:.40}",
            wanted="one of " + ", ".join(FORMATS),
            do="ask the node for a proof in one of them, or verify with the version of assay that "
            "wrote it",
        )
    pins = Pins.of(expect) if isinstance(expect, Round) else expect or Pins()
    if calibration is not None and pins.prover_dtype is None:
        calibration.find_build(header)
        if calibration.fixes_format(header):
            pins = replace(pins, prover_dtype=header.fingerprint.dtype)
    pins.check(header)
    # Only for its refusals, before a model is loaded.
    draw_records(proof, sample, 0)
    check_distinct_seeds(header.round, header.all_nonces())
    return pins


def draw_records(proof: Proof, sample: int | None, seed: int) -> list[Record]:
    """Return the records of a sample; a UsageError for too large a sample or a bad seed."""
    total = len(proof.records)
    size = min(LARGEST_SAMPLE, total) if sample is None else sample
    if type(size) is not int or not 1 <= size <= total:
        raise UsageError(
            f"a sample of {size}",
            wanted=f"1 to {total}, the nonces of this proof",
            do="change --sample",
        )
    if type(seed) is not int or seed < 0:
        raise UsageError(
            f"seed {seed!r}", wanted="a whole number from 0 upwards", do="leave it out"
        )
    chosen = np.random.default_rng(seed).choice(total, size=size, replace=False)
    return [proof.records[i] for i in sorted(chosen.tolist())]
