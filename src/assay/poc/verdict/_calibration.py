"""Calibrations: the measured honest noise of one build or several, their file, and the noise that judges a proof.

Schema 2 of the file holds any number of builds with any number of machines each. Schema 1, of the first version, held
one law between two engines; it is still read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.errors import AssayError, CalibrationError
from assay.poc.protocol import Fingerprint, Header
from assay.poc.verdict._build_file import build_as_dict, build_from_dict, first_version
from assay.poc.verdict._build_noise import BuildNoise, refuse_difference
from assay.poc.verdict._noise import Noise, default_noise
from assay.reports import dumps, read_json, write_atomic

KIND = "assay.poc.calibration"
SCHEMA = 2


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured honest noise: of one build, or of several in one file.

    Args:
        builds: Noise of every build, the first one first tried.
    """

    builds: tuple[BuildNoise, ...]

    def build_of(self, header: Header) -> BuildNoise:
        """Return the noise of the build that a proof was made with.

        Raises:
            CalibrationError: No build is of the proof's model, preset and engine; names what differs.
        """
        reason: CalibrationError | None = None
        for build in sorted(self.builds, key=lambda build: header.fingerprint not in build.known):
            try:
                build.check(header)
            except CalibrationError as error:
                reason = reason or error
            else:
                return build
        assert reason is not None, "a calibration has at least one build"
        raise reason

    def check(self, header: Header) -> None:
        """Refuse a proof of another model, preset or build than any that was measured.

        Raises:
            CalibrationError: Names what differs.
        """
        self.build_of(header)

    def check_kind(self, header: Header, engine: str) -> None:
        """Refuse a validator on a kind of engine that was not measured beside the prover's, before one starts.

        Args:
            header: Header of the proof.
            engine: Kind of the validator's engine, ``hf`` or ``vllm``.

        Raises:
            CalibrationError: Names the kind that was measured; or as of :meth:`build_of`.
        """
        kinds = {one.engine for one in self.build_of(header).judges(header.fingerprint)}
        if kinds and engine not in kinds:
            measured = " or ".join(sorted(kinds))
            raise CalibrationError(
                f"a calibration by which {measured} judges this prover",
                wanted=f"one by which {engine} does",
                do=f"pass --engine {measured}, or measure this pair with `assay poc calibrate A.jsonl B.jsonl`",
            )

    def is_of_format(self, header: Header) -> bool:
        """Return whether every build of a proof's checkpoint and preset was measured in the format that it states.

        Where one was not, a prover that may state any format chooses the law that judges it.
        """
        wanted = (header.digest, header.pipeline.name)
        builds = [build.known for build in self.builds if (build.digest, build.preset) == wanted]
        return all(not known or header.fingerprint.dtype in {one.dtype for one in known} for known in builds)

    @property
    def digests(self) -> tuple[str | None, ...]:
        """SHA-256 of the checkpoints of the builds."""
        return tuple(build.digest for build in self.builds)

    def merged(self, other: "Calibration") -> "Calibration":
        """Return a calibration with the builds of both; of a build that is in both, this one's measurement counts."""
        mine = [_identity(build) for build in self.builds]
        return Calibration(builds=(*self.builds, *(one for one in other.builds if _identity(one) not in mine)))

    def save(self, path: str | Path) -> None:
        """Write the calibration file in one piece, replacing an older one.

        Raises:
            StorageError: The file cannot be written.
        """
        builds = [build_as_dict(build) for build in self.builds]
        write_atomic(path, dumps({"kind": KIND, "schema": SCHEMA, "builds": builds}) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read a calibration file of either schema.

        Raises:
            CalibrationError: The file is not a calibration.
        """
        try:
            values = read_json(path)
            kind, schema = values.pop("kind", None), values.pop("schema", None)
            if kind != KIND or schema not in (1, SCHEMA):
                raise ValueError(f"kind {kind!r}, schema {schema!r}")
            builds = [first_version(values)] if schema == 1 else [build_from_dict(one) for one in values["builds"]]
            if not builds:
                raise ValueError("no build")
            return cls(builds=tuple(builds))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, AssayError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            seen = error.seen if isinstance(error, AssayError) else f"{path}: {reason}"
            raise CalibrationError(
                seen, wanted=f"a calibration file, schema {SCHEMA} or 1", do="write one with `assay poc calibrate`"
            ) from None


def _identity(build: BuildNoise) -> tuple[Any, ...]:
    names = sorted(machine.fingerprint.id if machine.fingerprint else machine.name for machine in build.machines)
    return build.preset, build.digest, tuple(names)


def noise_for(
    header: Header, validator: Fingerprint, calibration: Calibration | None, *, mixture: bool = False
) -> Noise:
    """Return the honest noise between the engine of a proof and the engine of its validator.

    Args:
        header: Header of the proof.
        validator: Description of the validator's engine.
        calibration: Measured honest noise; the stated default when None.
        mixture: Whether the model is a mixture of experts, of which a law of few distances is doubtful.

    Raises:
        CalibrationError: The calibration is of another model, preset or build; names what differs.
    """
    if calibration is None:
        return default_noise(header.pipeline.noise, header.fingerprint.dtype, validator.dtype)
    build = calibration.build_of(header)
    build.check_engine(validator, "than this validator's")
    judges = build.judges(header.fingerprint)
    if len(judges) == 1:  # the other one of a pair
        refuse_difference(judges[0].as_dict(), validator.as_dict(), "than this validator's")
    return build.between(header.fingerprint, validator, round=header.round, mixture=mixture)
