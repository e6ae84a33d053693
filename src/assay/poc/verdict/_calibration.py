"""Calibration from proofs: the noise between two engines.

Legend of shapes: N nonces.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from assay import stats
from assay.errors import AssayError, CalibrationError, DataError, ProofMismatch
from assay.poc.protocol import Fingerprint, Header, Pipeline, Proof
from assay.poc.verdict._judge import Law, Noise, default_noise, law_as_dict, law_from_dict, residuals
from assay.reports import dumps, read_json, write_atomic

KIND = "assay.poc.calibration"
SCHEMA = 1
MIN_NONCES = 30  # of two proofs in common
VECTOR_STEP = 2.0**-11  # of a float16 between one half and one
LAWS: dict[str, type[Law]] = {
    "distance": stats.ScaleNoise,
    "vector": stats.LogNoise,
    "position vector": stats.LogNoise,
}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Honest noise of one model and preset between two engines.

    Args:
        output: Family of noise that was compared: :attr:`assay.poc.Pipeline.noise`.
        prover: Fingerprint of the first engine.
        validator: Fingerprint of the second engine; the order does not matter.
        law: Fitted law, at the upper bound of its scale.
        n: Number of nonces measured.
        confidence: Confidence of the upper bound.
        digest: SHA-256 of the tensors of the checkpoint; None in files of the first version, which did not record it.
        preset: Preset of the two proofs; None in files of the first version.
    """

    output: str
    prover: Fingerprint
    validator: Fingerprint
    law: Law
    n: int
    confidence: float
    digest: str | None = None
    preset: str | None = None

    @property
    def noise(self) -> Noise:
        """The law with its source in words."""
        return Noise(self.law, f"calibration on {self.n} nonces")

    def check(self, header: Header) -> None:
        """Refuse a proof of another model or preset, or by another engine, than this was measured with.

        Raises:
            CalibrationError: Names what differs.
        """
        if self.digest is None or self.preset is None:
            raise CalibrationError(
                "a calibration that does not say of which model and preset it is",
                wanted="one made by this version: the noise of one model gives cheaters on a quieter one room",
                do="measure it again with `assay poc calibrate A.jsonl B.jsonl`",
            )
        stated = {"preset": header.pipeline.name, "checkpoint": header.digest[:12], "output": header.pipeline.noise}
        measured = {"preset": self.preset, "checkpoint": self.digest[:12], "output": self.output}
        _refuse(measured, stated, "than the proof's")
        _refuse_other_engine((self.prover, self.validator), header.fingerprint, "than the prover's")

    def as_dict(self) -> dict[str, Any]:
        """Return the one line of a calibration file."""
        parts = {"prover": self.prover.as_dict(), "validator": self.validator.as_dict(), "law": law_as_dict(self.law)}
        return {"kind": KIND, "schema": SCHEMA, **self.__dict__, **parts}

    def save(self, path: str | Path) -> None:
        """Write the calibration file in one piece, replacing an older one.

        Raises:
            StorageError: The file cannot be written.
        """
        write_atomic(path, dumps(self.as_dict()) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read a calibration file.

        Raises:
            CalibrationError: The file is not a calibration.
        """
        try:
            values = read_json(path)
            if (values.pop("kind"), values.pop("schema")) != (KIND, SCHEMA):
                raise ValueError("another kind or schema")
            values["prover"] = Fingerprint.from_dict(values["prover"])
            values["validator"] = Fingerprint.from_dict(values["validator"])
            values["law"] = law_from_dict(values["law"])
            read = cls(**values)
            if any(not isinstance(value, str | None) for value in (read.digest, read.preset)):
                raise ValueError(f"digest {read.digest!r:.60}, preset {read.preset!r:.60}")
            if type(read.law) is not LAWS.get(read.output):
                raise ValueError(f"a {type(read.law).__name__} for output {read.output!r:.60}")
            if type(read.n) is not int or read.n < MIN_NONCES:
                raise ValueError(f"{read.n!r:.60} nonces, fewer than {MIN_NONCES}")
            return read
        except (ValueError, TypeError, KeyError, AttributeError, DataError) as error:
            seen = error.seen if isinstance(error, AssayError) else f"{path}: {error}"
            raise CalibrationError(
                seen, wanted=f"a calibration file, schema {SCHEMA}", do="write one with `assay poc calibrate`"
            ) from None


def noise_for(header: Header, validator: Fingerprint, calibration: Calibration | None) -> Noise:
    """Return the honest noise between the engine of a proof and the engine of its validator.

    Raises:
        CalibrationError: The calibration is of another model, preset or pair of engines; names what differs.
    """
    if calibration is None:
        return default_noise(header.pipeline.noise, header.fingerprint.dtype, validator.dtype)
    calibration.check(header)
    other = calibration.validator if header.fingerprint.id == calibration.prover.id else calibration.prover
    _refuse_other_engine((other,), validator, "than this validator's")
    return calibration.noise


def calibrate(first: Proof, second: Proof) -> Calibration:
    """Measure the noise between the engines of two proofs of the same round.

    Residuals are taken over the nonces that both contain. The law is the robust fit of
    :func:`assay.stats.fit_scale_noise` or :func:`assay.stats.fit_log_noise`, at its upper bound.

    Args:
        first: Proof of one engine.
        second: Proof of the other engine, or of the same one again.

    Returns:
        The calibration, which holds for this model, preset and pair of engines.

    Raises:
        ProofMismatch: The proofs are of other rounds or checkpoints, or have fewer than 30 nonces in common.

    Example:
        >>> import assay
        >>> from assay.poc import Round
        >>> model = assay.load_model("reference:qwen3", device="cpu")
        >>> round = Round(block_hash="block_alpha", public_key="node_A", seq_len=16)
        >>> first = assay.poc.prove(model, round, range(32), batch_size=32)
        >>> second = assay.poc.prove(model, round, range(32), batch_size=16)
        >>> calibration = assay.poc.calibrate(first, second)
        >>> calibration.n, calibration.preset, calibration.prover.batch_size, calibration.validator.batch_size
        (32, 'poc-2.0', 32, 16)
    """
    ours = {record.nonce: record for record in second.records}
    common = [record for record in first.records if record.nonce in ours]
    one, other = first.header, second.header
    same = (one.round, one.digest, one.weights) == (other.round, other.digest, other.weights)
    if not same or len(common) < MIN_NONCES:
        raise ProofMismatch(
            f"proofs with {len(common)} nonces in common" if same else "proofs of different rounds or checkpoints",
            wanted=f"two proofs of one round and checkpoint, with at least {MIN_NONCES} nonces in common",
            do="prove the same round on both engines, for instance --nonces 0:256",
        )
    errors = residuals(common, [ours[record.nonce] for record in common])
    law, confidence = fit_noise(one.pipeline, errors)
    return Calibration(
        output=one.pipeline.noise,
        prover=one.fingerprint,
        validator=other.fingerprint,
        law=law,
        n=len(common),
        confidence=confidence,
        digest=one.digest,
        preset=one.pipeline.name,
    )


def _refuse_other_engine(measured: Sequence[Fingerprint], present: Fingerprint, than: str) -> None:
    """Refuse the calibration if the measured engine that is nearest to the present one differs from it in a field."""
    wanted = present.as_dict()
    differing = [{name: value for name, value in one.as_dict().items() if value != wanted[name]} for one in measured]
    nearest = min(differing, key=len)
    _refuse(nearest, {name: wanted[name] for name in nearest}, than)


def _refuse(measured: Mapping[str, Any], stated: Mapping[str, Any], than: str) -> None:
    other = [name for name in measured if measured[name] != stated[name]]
    if other:
        raise CalibrationError(
            f"a calibration with another {' and '.join(other)} {than}: " + ", ".join(str(measured[n]) for n in other),
            wanted=", ".join(f"{name} {stated[name]}" for name in other),
            do="measure it with `assay poc calibrate A.jsonl B.jsonl`, or leave --calibration out",
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
