"""Calibrations: the measured honest noise of one build or several, their file, and the noise that judges a proof.

Schema 2 of the file holds any number of builds with any number of machines each. Schema 1, of the first version, held
one law between two engines; it is still read.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from assay.errors import AssayError, CalibrationError
from assay.files.jsonl import JsonObject, dumps, read_json
from assay.files.storage import write_atomic
from assay.poc.protocol.builds import Build
from assay.poc.protocol.pins_file import NetworkPins
from assay.poc.protocol.proof import parse_fingerprint
from assay.poc.protocol.record import Fingerprint, Header
from assay.poc.protocol.round import Round
from assay.poc.verdict.builds import LAWS, MIN_NONCES, BuildNoise, Machine, machines_of, refuse_difference
from assay.poc.verdict.machines import LeftOut, MachineNoise, Sizes
from assay.poc.verdict.noise import Noise, default_noise, law_as_dict, law_from_dict, named_from_dict, spread_from_dict
from assay.stats.noise import Spread

# --------------------------------------------------------------------------------------------------
# The noise of a build as values of a calibration file, and back.

_MOST_MACHINES = 4096
_LONGEST_NAME = 4096  # a kind of machine is its device and its number format
_SIZES = (1e-30, 1e3)  # far beyond what residuals of unit vectors can have, relative to a block or not


def build_as_dict(build: BuildNoise) -> JsonObject:
    """Return JSON-ready values."""
    noise = build.noise
    machines = [
        {"name": one.name, "kind": one.kind, "fingerprint": one.fingerprint.as_dict() if one.fingerprint else None}
        for one in build.machines
    ]
    told = {"mixture": True} if build.mixture else {}  # a file without it is one of before
    return told | {
        "output": build.output,
        "preset": build.preset,
        "digest": build.digest,
        "n": build.n,
        "hidden_size": build.hidden_size,
        "effect": build.effect,
        "machines": machines,
        "law": law_as_dict(noise.law),
        "sizes": [[i, j, size] for (i, j), size in noise.sizes.pairs.items()],
        "spread": asdict(noise.spread),
        "known": asdict(noise.known),
        "left_out": asdict(build.left_out) if build.left_out else None,
        "named": {name: law_as_dict(law) for name, law in build.named.items()},
    }


def build_from_dict(values: Any) -> BuildNoise:
    """Read what :func:`build_as_dict` wrote.

    Raises:
        ValueError: A value cannot come from a measurement. TypeError, KeyError and AttributeError mean the same.
    """
    values = dict(values)
    machines = tuple(_machine(one) for one in values.pop("machines"))
    law = law_from_dict(values.pop("law"))
    spread, known = spread_from_dict(values.pop("spread")), spread_from_dict(values.pop("known"))
    pairs = {(i, j): _size(size) for i, j, size in values.pop("sizes")}
    indices = range(len(machines))
    listed = all(i in indices and j in indices and i < j for i, j in pairs)
    if not (2 <= len(machines) <= _MOST_MACHINES and pairs and listed):
        raise ValueError("sizes of other machines than are listed")
    sizes = Sizes(pairs, tuple(machine.kind for machine in machines))
    left_out, named = values.pop("left_out"), values.pop("named")
    build = BuildNoise(
        **values,
        machines=machines,
        noise=MachineNoise(law, sizes, spread, known),
        left_out=LeftOut(**{name: _number(value) for name, value in left_out.items()}) if left_out else None,
        named=named_from_dict(named),
    )
    _check(build)
    return build


def _check(build: BuildNoise) -> None:
    """Refuse values that no measurement gives.

    Raises:
        ValueError: Says which.
    """
    if any(not isinstance(value, str | None) for value in (build.digest, build.preset)):
        raise ValueError(f"digest {build.digest!r:.60}, preset {build.preset!r:.60}")
    if any(type(law) is not LAWS.get(build.output) for law in (build.noise.law, *build.named.values())):
        raise ValueError(f"a {type(build.noise.law).__name__} for output {build.output!r:.60}")
    if type(build.n) is not int or build.n < MIN_NONCES:
        raise ValueError(f"{build.n!r:.60} nonces, fewer than {MIN_NONCES}")
    if type(build.hidden_size) is not int or not 0 <= build.hidden_size <= 2**20:
        raise ValueError(f"hidden size {build.hidden_size!r:.60}")
    if build.mixture not in (None, True):
        raise ValueError(f"mixture {build.mixture!r:.60}")
    if build.effect is not None and not 1 < _number(build.effect) < 100:
        raise ValueError(f"effect {build.effect!r:.60}")


def first_version(values: JsonObject) -> BuildNoise:
    """Return the noise of a file of schema 1, whose law was an upper one."""
    values = dict(values)
    one, other = parse_fingerprint(values["prover"]), parse_fingerprint(values["validator"])
    law = law_from_dict(values["law"])
    machines = machines_of([one, other])
    sizes = Sizes({(0, 1): law.size}, tuple(machine.kind for machine in machines))
    build = BuildNoise(
        output=values["output"],
        preset=values.get("preset"),
        digest=values.get("digest"),
        machines=machines,
        noise=MachineNoise(law, sizes, Spread(), Spread()),
        n=values["n"],
    )
    _check(build)
    return build


def _machine(values: Any) -> Machine:
    stated = values["fingerprint"]
    return Machine(
        name=_text(values["name"], 1),
        kind=_text(values["kind"], 0),
        fingerprint=None if stated is None else parse_fingerprint(stated),
    )


def _text(value: Any, fewest: int) -> str:
    if not isinstance(value, str) or not fewest <= len(value) <= _LONGEST_NAME or not value.isprintable():
        raise ValueError(f"a name {value!r:.60}")
    return value


def _size(value: Any) -> float:
    low, high = _SIZES
    if not low <= _number(value) <= high:
        raise ValueError(f"a size of {value!r:.60}")
    return float(value)


def _number(value: Any) -> Any:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.60} where a finite number belongs")
    return value


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


# --------------------------------------------------------------------------------------------------
# Which of several calibrations is that of a proof, or of a build where there is no proof.


def noise_of_build(
    calibrations: Iterable[Calibration], build: Build | None, *, digest: str, preset: str, round: Round | None
) -> Noise | None:
    """Return the noise of a build with any validator, for messages that name no engine; None where none was measured.

    Args:
        calibrations: Calibrations, the first one first tried.
        build: Build that the network allows; any when None.
        digest: SHA-256 of the checkpoint.
        preset: Preset of the rounds.
        round: Round whose block scales distances; None for the law at the usual scale.
    """
    for measured in (one for calibration in calibrations for one in calibration.builds):
        if (measured.digest, measured.preset) == (digest, preset):
            allowed = [known for known in measured.known if build is None or not build.differing(known)]
            if allowed or not measured.known:
                return measured.between(allowed[0] if len(allowed) == 1 else None, None, round=round)
    return None


def pinned_calibration(network: NetworkPins, header: Header) -> Calibration | None:
    """Return the first calibration of the proof's model that was measured with its preset and build.

    Args:
        network: Pins whose files are read, each after its hash was compared.
        header: Header of the proof, which the pins allow.

    Returns:
        The calibration; None where the network pins none for this model, so that the stated default holds.

    Raises:
        CalibrationError: There are calibrations, and none is of this proof: a wider law must not take its place.
        DataError: A file cannot be read, or is another one than was pinned.
        UsageError: The model is not one of the network's.
    """
    reason = None
    for path in network.calibrations(network.model(header.digest)):
        calibration = Calibration.load(path)
        try:
            calibration.check(header)
        except CalibrationError as error:
            reason = error.with_traceback(None)
        else:
            return calibration
    if reason is not None:
        raise CalibrationError(
            f"no pinned calibration of this proof; the last has: {reason.seen}",
            wanted=reason.wanted,
            do="measure this build with `assay poc calibrate`, and pin the file; or pass --calibration",
        )
    return None
