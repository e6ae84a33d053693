"""Calibration: the noise between two engines, measured from two proofs of one round."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from assay import stats
from assay.errors import AssayError, CalibrationError, DataError, ProofMismatch
from assay.poc.protocol import Fingerprint, Header, Pipeline, Proof
from assay.poc.verdict._judge import residuals
from assay.poc.verdict._noise import Law, Noise, default_noise, law_as_dict, law_from_dict
from assay.reports import dumps, read_json, write_atomic

__all__ = ["Calibration", "calibrate", "fit_noise", "noise_for"]

KIND = "assay.poc.calibration"
SCHEMA = 1
MIN_NONCES = 30
VECTOR_STEP = 2.0**-11  # of a float16 between one half and one
LAWS: dict[str, type[Law]] = {
    "distance": stats.ScaleNoise,
    "vector": stats.LogNoise,
    "position vector": stats.LogNoise,
}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Honest noise between two engines.

    Args:
        output: what was compared: :attr:`assay.poc.Pipeline.noise`.
        prover: fingerprint of the first engine.
        validator: fingerprint of the second; the order does not matter.
        law: the fitted law, at the upper bound of its scale.
        n: nonces measured.
        confidence: of the upper bound.
    """

    output: str
    prover: Fingerprint
    validator: Fingerprint
    law: Law
    n: int
    confidence: float

    def as_dict(self) -> dict[str, Any]:
        """Return the one line of a calibration file."""
        return {
            "kind": KIND,
            "schema": SCHEMA,
            "output": self.output,
            "prover": self.prover.as_dict(),
            "validator": self.validator.as_dict(),
            "law": law_as_dict(self.law),
            "n": self.n,
            "confidence": self.confidence,
        }

    def save(self, path: str | Path) -> None:
        """Write the calibration file in one piece, replacing an older one.

        Raises:
            StorageError: it cannot be written.
        """
        write_atomic(path, dumps(self.as_dict()) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read a calibration file.

        Raises:
            CalibrationError: it is not one.
        """
        try:
            values = read_json(path)
            if (values.pop("kind"), values.pop("schema")) != (KIND, SCHEMA):
                raise ValueError("another kind or schema")
            values["prover"] = Fingerprint.from_dict(values["prover"])
            values["validator"] = Fingerprint.from_dict(values["validator"])
            values["law"] = law_from_dict(values["law"])
            read = cls(**values)
            if type(read.law) is not LAWS.get(read.output):
                raise ValueError(f"a {type(read.law).__name__} for output {read.output!r:.60}")
            if type(read.n) is not int or read.n < MIN_NONCES:
                raise ValueError(f"{read.n!r:.60} nonces, fewer than {MIN_NONCES}")
            return read
        except CalibrationError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, DataError) as error:
            seen = error.seen if isinstance(error, AssayError) else f"{path}: {error}"
            raise CalibrationError(
                seen, wanted=f"a calibration file, schema {SCHEMA}", do="write one with `assay poc calibrate`"
            ) from None


def noise_for(header: Header, validator: Fingerprint, calibration: Calibration | None) -> Noise:
    """Return the honest noise between the engine of a proof and the engine of its validator.

    Raises:
        CalibrationError: the calibration is for another pair of engines or kind of output.
    """
    if calibration is None:
        return default_noise(header.pipeline.noise, header.fingerprint.dtype, validator.dtype)
    pair = {header.fingerprint.id, validator.id}
    measured = {calibration.prover.id, calibration.validator.id}
    if pair != measured or calibration.output != header.pipeline.noise:
        raise CalibrationError(
            f"a calibration of {calibration.output}s between engines {' and '.join(sorted(measured))}",
            wanted=f"one of {header.pipeline.noise}s between {' and '.join(sorted(pair))}",
            do="measure it with `assay poc calibrate A.jsonl B.jsonl`, or leave --calibration out",
        )
    return Noise(calibration.law, f"calibration on {calibration.n} nonces")


def calibrate(first: Proof, second: Proof) -> Calibration:
    """Measure the noise between the engines of two proofs of the same round.

    Residuals are taken over the nonces that both contain. The law is the robust fit of
    :func:`assay.stats.fit_scale_noise` or :func:`assay.stats.fit_log_noise`, at its upper bound.

    Raises:
        ProofMismatch: other rounds or checkpoints, or fewer than 30 nonces in common.
    """
    ours = {record.nonce: record for record in second.records}
    common = [record for record in first.records if record.nonce in ours]
    same = first.round == second.round and first.header.digest == second.header.digest
    if not same or len(common) < MIN_NONCES:
        raise ProofMismatch(
            f"proofs with {len(common)} nonces in common" if same else "proofs of different rounds or checkpoints",
            wanted=f"two proofs of one round and checkpoint, with at least {MIN_NONCES} nonces in common",
            do="prove the same round on both engines, for instance --nonces 0:256",
        )
    errors = residuals(common, [ours[record.nonce] for record in common])
    law, confidence = fit_noise(first.header.pipeline, errors)
    return Calibration(
        output=first.header.pipeline.noise,
        prover=first.header.fingerprint,
        validator=second.header.fingerprint,
        law=law,
        n=len(common),
        confidence=confidence,
    )


def fit_noise(pipeline: Pipeline, errors: npt.NDArray[np.float64]) -> tuple[Law, float]:
    """Fit the law of honest residuals [N] of a pipeline; return it with its confidence."""
    if pipeline.output == "vector":
        # Rounded to float16, equal vectors may differ by a step. The published law came before that was measured.
        floor = 1e-4 if pipeline.read == "last" else VECTOR_STEP
        vectors = stats.fit_log_noise(errors, dimension=pipeline.vector_size, floor=floor)
        return vectors.law, vectors.confidence
    distances = stats.fit_scale_noise(errors)
    return distances.law, distances.confidence
