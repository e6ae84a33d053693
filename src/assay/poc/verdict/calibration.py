"""Calibrations: the measured honest noise of builds, their file, and the noise that judges a proof.

Schema 2 of the file holds any number of builds with any number of machines each. Schema 1, of the first version, held
one law between two engines; it is still read.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import AfterValidator, Field, PlainValidator, TypeAdapter

from assay import stats
from assay.errors import AssayError, CalibrationError
from assay.files.jsonl import JsonObject, dumps, read_json
from assay.files.storage import write_atomic
from assay.poc.protocol.blocks import block_scale
from assay.poc.protocol.pins import Build
from assay.poc.protocol.pins_file import NetworkPins
from assay.poc.protocol.proof import STRICT, Fingerprint, Header
from assay.poc.protocol.round import Round
from assay.poc.verdict.noise import (
    FloatArray,
    Law,
    Noise,
    ReadLaw,
    ReadSpread,
    default_noise,
    law_as_dict,
    read_law,
)
from assay.stats.noise import Spread

Pair = tuple[int, int]

KIND = "assay.poc.calibration"
SCHEMA = 2

MIN_NONCES = 30  # that two machines have in common
FEWEST_MACHINES = 3  # that show how machines differ
MOST_ACCUSED, WORST_ACCUSED = 1e-3, 5e-3  # share of honest audits of left-out machines: on average, of one pair
MIXTURE_DOF = 2.5
"""Most degrees of freedom of a law of distances of a mixture, because one block may show too light a tail.

Distances of many blocks of a small Qwen3-MoE choose this value. It was tested on Mixtral and on a mixture that was not
measured before (research/results/mixture_wider.json), and with as many nonces in the audit as in the law
(mixture_audits.json beside it).
"""

LAWS: dict[str, type[Law]] = {
    "distance": stats.ScaleNoise,
    "position distance": stats.ScaleNoise,
    "vector": stats.LogNoise,
    "position vector": stats.LogNoise,
    "tokens": stats.LogNoise,
    "few tokens": stats.LogNoise,
}
"""Kind of law by family of noise."""

_MEASURED = {"dtype", "seq_len"}  # fields whose value must have been measured
_MEASURE = "measure it again with `assay poc calibrate A.jsonl B.jsonl`"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the noise between machines.

    Args:
        pairs: Median residual by pair (i, j) with i < j; pairs with median 0 are left out.
        kinds: Kind of every machine, such as its GPU; empty where it is unknown.
    """

    pairs: Mapping[Pair, float]
    kinds: tuple[str, ...]

    def between(self, one: int, other: int) -> float | None:
        """Return the size between two machines; None where it was not measured."""
        return self.pairs.get((min(one, other), max(one, other)))

    @property
    def typical(self) -> float:
        """Median size over all pairs."""
        return float(np.median(list(self.pairs.values())))

    def without(self, machine: int) -> "Sizes":
        """Return the sizes of the pairs that a machine is not in."""
        return Sizes({pair: size for pair, size in self.pairs.items() if machine not in pair}, self.kinds)

    def predict(self, kind: str, validator: int | None = None) -> float:
        """Return the size to expect of a new machine of a kind against a validator's machine, or against any."""
        machines = range(len(self.kinds))
        judges = [validator] if validator is not None else list(machines)
        against = {
            (i, j): size for j in judges for i in machines if i != j and (size := self.between(i, j)) is not None
        }
        if not against:  # the validator's machine was measured with none of these
            return self.typical
        foreign = {
            (i, j): size for (i, j), size in against.items() if not self.kinds[i] or self.kinds[i] != self.kinds[j]
        }
        usual = float(np.median(list(self._by_kind(foreign or against).values())))
        alike = self._by_kind(against).get(kind) if kind else None
        return usual if alike is None else max(usual, alike)

    def _by_kind(self, sizes: Mapping[Pair, float]) -> dict[str | int, float]:
        """Return the median size by kind of the first machine; a machine of unknown kind is a kind of its own."""
        found: dict[str | int, list[float]] = {}
        for (i, _), size in sizes.items():
            found.setdefault(self.kinds[i] or i, []).append(size)
        return {kind: float(np.median(values)) for kind, values in found.items()}

    def deviations(self) -> FloatArray:
        """Return ln(size / predicted) of every machine as if it were new, against every other machine."""
        found, machines = [], range(len(self.kinds))
        for i in machines:
            rest = self.without(i)
            if rest.pairs:
                measured = [(j, size) for j in machines if (size := self.between(i, j)) is not None]
                found += [math.log(size / rest.predict(self.kinds[i], j)) for j, size in measured]
        return np.array(found)


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """How often honest machines were accused that were left out of the measurement.

    Args:
        accused: Share of audits that accuse.
        low: Lower end of its 95 % interval over machines (:func:`assay.stats.grouped_share_interval`).
        high: Upper end of that interval. It is at least that of as many machines without an accusation, because few
            machines do not show that all others are like them.
        worst: Largest share of one pair of machines.
        pairs: Number of ordered pairs.
        audits: Number of audits of each pair.
        checked: Number of nonces of an audit.
    """

    __pydantic_config__: ClassVar = STRICT

    accused: float
    low: float
    high: float
    worst: float
    pairs: int
    audits: int
    checked: int

    @property
    def holds(self) -> bool:
        """Whether at most one audit in a thousand accuses on average, and five in a thousand in the worst pair."""
        return self.accused <= MOST_ACCUSED and self.worst <= WORST_ACCUSED


@dataclass(frozen=True)
class MachineNoise:
    """Noise of one build, fitted to pairs of machines.

    Args:
        law: Law at the typical size.
        sizes: Sizes by pair.
        spread: Spread of a machine that was not measured.
        known: Spread of a pair that was measured: the error of its size.
    """

    law: Law
    sizes: Sizes
    spread: Spread
    known: Spread

    def predict_law(self, kind: str, validator: int | None = None) -> Law:
        """Return the law of a new machine of a kind against a validator's machine."""
        return self.law.scaled(self.sizes.predict(kind, validator) / self.sizes.typical)


def _check_name(text: str) -> str:
    if not text.isprintable():
        raise ValueError("a name that cannot be printed")
    return text


def _read_pairs(values: Any) -> dict[Pair, float]:
    sizes = TypeAdapter(list[tuple[Index, Index, Size]], config=STRICT).validate_json(dumps(values))
    if not sizes or any(i >= j for i, j, _ in sizes):
        raise ValueError("sizes that are not of pairs of machines")
    return {(i, j): size for i, j, size in sizes}


Name = Annotated[str, Field(max_length=4096), AfterValidator(_check_name)]  # a kind is a device and a number format
Index = Annotated[int, Field(ge=0)]
Size = Annotated[float, Field(ge=1e-30, le=1e3)]  # far beyond what residuals of unit vectors can have


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine that was measured.

    Args:
        name: Name in tables; the identity of its engine where nothing else is known.
        kind: Kind of machine, such as its GPU; empty where it is unknown.
        fingerprint: Description of its engine; None for vectors that were published without one.
    """

    __pydantic_config__: ClassVar = STRICT

    name: Annotated[Name, Field(min_length=1)]
    kind: Name
    fingerprint: Annotated[
        Fingerprint | None, PlainValidator(lambda one: None if one is None else Fingerprint.from_dict(one))
    ]


@dataclass(frozen=True, kw_only=True)
class BuildNoise:
    """Honest noise of one build, preset and checkpoint.

    A field of the fingerprint in which all measured machines agree belongs to the build, and a proof must agree in it
    too. A field in which they differ belongs to the machine and may have any value, but the number format must be that
    of a measured machine. Two machines do not show how machines differ, so with two only these are judged.

    Args:
        output: Family of noise that was compared: :attr:`assay.poc.Pipeline.noise`.
        preset: Preset of the proofs; None in files of the first version.
        digest: SHA-256 of the tensors of the checkpoint; None in files of the first version, which did not record it,
            and for vectors without a model.
        machines: Machines that were measured.
        law: Law at the typical size.
        sizes: Median residual by pair (i, j) of machines with i < j.
        spread: Spread of ln size of a machine that was not measured.
        known: Spread of a pair that was measured.
        n: Nonces of the pair that has the fewest in common.
        hidden_size: Hidden size of the model where the law is relative to the block's own scale; 0 where it is not.
        effect: Smallest multiple of the noise that counts as another computation; the usual one when None.
        left_out: How often honest machines were accused that the law does not know; None with fewer than three.
        mixture: Whether the model is a mixture of experts; None where the measurement was not told.
    """

    __pydantic_config__: ClassVar = STRICT

    output: str
    preset: str | None
    digest: str | None
    machines: Annotated[tuple[Machine, ...], Field(min_length=2, max_length=4096)]
    law: ReadLaw
    sizes: Annotated[Mapping[Pair, float], PlainValidator(_read_pairs)]
    spread: ReadSpread
    known: ReadSpread
    n: Annotated[int, Field(ge=MIN_NONCES)]
    hidden_size: Annotated[int, Field(ge=0, le=2**20)] = 0
    effect: Annotated[float, Field(gt=1, lt=100)] | None = None
    left_out: LeftOut | None = None
    mixture: bool | None = None

    @property
    def noise(self) -> MachineNoise:
        """The noise between machines."""
        sizes = Sizes(self.sizes, tuple(machine.kind for machine in self.machines))
        return MachineNoise(self.law, sizes, self.spread, self.known)

    @property
    def engines(self) -> list[Fingerprint]:
        """The fingerprints of the measured machines."""
        return [machine.fingerprint for machine in self.machines if machine.fingerprint is not None]

    @property
    def identity(self) -> tuple[object, ...]:
        """What two measurements of one build have in common."""
        names = sorted(machine.fingerprint.id if machine.fingerprint else machine.name for machine in self.machines)
        return self.preset, self.digest, tuple(names)

    @property
    def source(self) -> str:
        """Where the law comes from, in words."""
        of_machines = f" of {len(self.machines)} machines" if len(self.machines) >= FEWEST_MACHINES else ""
        return f"calibration on {self.n} nonces{of_machines}"

    def judges(self, prover: Fingerprint) -> list[Fingerprint]:
        """Return the fingerprints of the measured machines that may judge a prover: of a pair, the other one."""
        if not 0 < len(self.engines) < FEWEST_MACHINES:
            return self.engines
        one, two = self.engines
        return [two if prover == one else one]

    def check_header(self, header: Header) -> None:
        """Refuse a proof of another model, preset or build than was measured."""
        if self.digest is None or self.preset is None:
            raise CalibrationError(
                "a calibration that does not say of which model and preset it is",
                wanted="one made by this version: the noise of one model gives cheaters on a quieter one room",
                do=_MEASURE,
            )
        stated = {"preset": header.pipeline.name, "checkpoint": header.digest[:12], "output": header.pipeline.noise}
        measured = {"preset": self.preset, "checkpoint": self.digest[:12], "output": self.output}
        _refuse_difference(measured, stated, "than the proof's")
        self.check_engine(header.fingerprint, "than the prover's")

    def check_engine(self, engine: Fingerprint, than: str) -> None:
        """Refuse an engine of another build; the error names the fields that differ from the nearest measured one."""
        if not self.engines:
            return
        wanted, measured = engine.as_dict(), [known.as_dict() for known in self.engines]
        of_machine: set[str] = set()
        if len(measured) >= FEWEST_MACHINES:
            of_machine = {name for name in wanted if len({str(one[name]) for one in measured}) > 1} - _MEASURED
        differing = [
            {name: value for name, value in one.items() if value != wanted[name] and name not in of_machine}
            for one in measured
        ]
        nearest = min(differing, key=len)
        _refuse_difference(nearest, {name: wanted[name] for name in nearest}, than)

    def between(
        self, prover: Fingerprint | None, validator: Fingerprint | None, *, round: Round | None = None
    ) -> Noise:
        """Return the noise between a prover's machine and a validator's.

        Args:
            prover: Description of the prover's engine; None for any machine of the build.
            validator: Description of the validator's engine; None for any.
            round: Round whose block scales a law that is relative to it.
        """
        row, mine = self._row(validator), self._row(prover)
        law = self.noise.predict_law(_kind(prover) if prover is not None else "", row)
        measured = row is not None and mine is not None and len(self.machines) < FEWEST_MACHINES
        noise = Noise(law, self.source, self.known if measured else self.spread, self.effect)
        if self.hidden_size and round is not None:
            return noise.scaled(block_scale(round, self.hidden_size))
        return noise

    def _row(self, engine: Fingerprint | None) -> int | None:
        if engine is None:
            return None
        same = [i for i, machine in enumerate(self.machines) if machine.fingerprint == engine]
        alike = [i for i, machine in enumerate(self.machines) if machine.kind and machine.kind == _kind(engine)]
        return next(iter(same + alike), None)

    def as_dict(self) -> JsonObject:
        """Return JSON-ready values, which :meth:`from_dict` reads back."""
        told = {"mixture": True} if self.mixture else {}  # older files do not have it
        names = ("output", "preset", "digest", "n", "hidden_size", "effect")
        engines = [one.fingerprint and one.fingerprint.as_dict() for one in self.machines]
        return told | {
            **{name: getattr(self, name) for name in names},
            "machines": [vars(one) | {"fingerprint": e} for one, e in zip(self.machines, engines, strict=True)],
            "law": law_as_dict(self.law),
            "sizes": [[i, j, size] for (i, j), size in self.sizes.items()],
            "spread": asdict(self.spread),
            "known": asdict(self.known),
            "left_out": asdict(self.left_out) if self.left_out else None,
            "named": {},  # where earlier releases have laws of known cheats
        }

    @classmethod
    def from_dict(cls, values: Any) -> "BuildNoise":
        """Read what :meth:`as_dict` wrote.

        Raises:
            ValueError: No measurement gives a value. AssayError and the errors of wrong types mean the same.
        """
        build = TypeAdapter(cls).validate_json(dumps({name: one for name, one in values.items() if name != "named"}))
        if type(build.law) is not LAWS.get(build.output):
            raise ValueError(f"a law of another kind than {build.output!r:.60} has")
        if max(j for _, j in build.sizes) >= len(build.machines):
            raise ValueError("sizes of other machines than are listed")
        return build

    @classmethod
    def from_first_version(cls, values: JsonObject) -> "BuildNoise":
        """Read the values of a file of schema 1, whose law was an upper one; errors are as of :meth:`from_dict`."""
        engines = [Fingerprint.from_dict(values[name]) for name in ("prover", "validator")]
        law, known = read_law(values["law"]), asdict(Spread())
        whole = {name: value for name, value in values.items() if name in cls.__annotations__}
        whole |= {"preset": values.get("preset"), "digest": values.get("digest"), "spread": known, "known": known}
        machines = [{"name": one.id, "kind": _kind(one), "fingerprint": one.as_dict()} for one in engines]
        return cls.from_dict(whole | {"machines": machines, "sizes": [[0, 1, law.size]]})


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured honest noise: of one build, or of several in one file.

    Args:
        builds: Noise of every build, the first one first tried.
    """

    builds: tuple[BuildNoise, ...]

    def find_build(self, header: Header) -> BuildNoise:
        """Return the noise of the build that a proof was made with.

        Raises:
            CalibrationError: No build is of the proof's model, preset and engine; names what differs.
        """
        reason: CalibrationError | None = None
        for build in sorted(self.builds, key=lambda build: header.fingerprint not in build.engines):
            try:
                build.check_header(header)
            except CalibrationError as error:
                reason = reason or error
            else:
                return build
        assert reason is not None, "a calibration has at least one build"
        raise reason

    def check_kind(self, header: Header, engine: str) -> None:
        """Refuse a validator on a kind of engine that was not measured beside the prover's, before one starts.

        Args:
            header: Header of the proof.
            engine: Kind of the validator's engine, ``hf`` or ``vllm``.

        Raises:
            CalibrationError: Names the kind that was measured; or as of :meth:`find_build`.
        """
        kinds = {one.engine for one in self.find_build(header).judges(header.fingerprint)}
        if kinds and engine not in kinds:
            measured = " or ".join(sorted(kinds))
            raise CalibrationError(
                f"a calibration by which {measured} judges this prover",
                wanted=f"one by which {engine} does",
                do=f"pass --engine {measured}, or measure this pair with `assay poc calibrate A.jsonl B.jsonl`",
            )

    def fixes_format(self, header: Header) -> bool:
        """Return whether every build of a proof's checkpoint and preset was measured in the number format it states.

        Where one was not, a prover that may state any format chooses the law that judges it.
        """
        wanted = (header.digest, header.pipeline.name)
        builds = [build.engines for build in self.builds if (build.digest, build.preset) == wanted]
        return all(not known or header.fingerprint.dtype in {one.dtype for one in known} for known in builds)

    @property
    def digests(self) -> tuple[str | None, ...]:
        """SHA-256 of the checkpoints of the builds."""
        return tuple(build.digest for build in self.builds)

    def merged(self, other: "Calibration") -> "Calibration":
        """Return a calibration with the builds of both; for a build that is in both, this one's measurement counts."""
        mine = [build.identity for build in self.builds]
        return Calibration(builds=(*self.builds, *(one for one in other.builds if one.identity not in mine)))

    def save(self, path: str | Path) -> None:
        """Write the calibration file in one piece, replacing an older one.

        Raises:
            StorageError: The file cannot be written.
        """
        builds = [build.as_dict() for build in self.builds]
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
            builds = (
                [BuildNoise.from_first_version(values)]
                if schema == 1
                else [BuildNoise.from_dict(one) for one in values["builds"]]
            )
            if not builds:
                raise ValueError("no build")
            return cls(builds=tuple(builds))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, AssayError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            seen = error.seen if isinstance(error, AssayError) else f"{path}: {reason}"
            raise CalibrationError(
                seen, wanted=f"a calibration file, schema {SCHEMA} or 1", do="write one with `assay poc calibrate`"
            ) from None


def describe_machines(fingerprints: Sequence[Fingerprint]) -> tuple[Machine, ...]:
    """Return the machines with these engines."""
    return tuple(Machine(name=one.id, kind=_kind(one), fingerprint=one) for one in fingerprints)


def noise_for(header: Header, validator: Fingerprint, calibration: Calibration | None) -> Noise:
    """Return the honest noise between the engine of a proof and the engine of its validator.

    Args:
        header: Header of the proof.
        validator: Description of the validator's engine.
        calibration: Measured honest noise; the stated default when None.

    Raises:
        CalibrationError: The calibration is of another model, preset or build; names what differs.
    """
    if calibration is None:
        return default_noise(header.pipeline.noise, header.fingerprint.dtype, validator.dtype)
    build = calibration.find_build(header)
    than = "than this validator's"
    build.check_engine(validator, than)
    judges = build.judges(header.fingerprint)
    if len(judges) == 1:  # the other one of a pair
        _refuse_difference(judges[0].as_dict(), validator.as_dict(), than)
    return build.between(header.fingerprint, validator, round=header.round)


def find_build_noise(
    calibrations: Iterable[Calibration], build: Build | None, *, digest: str, preset: str, round: Round | None
) -> Noise | None:
    """Return the noise of a build with any validator, for messages that name no engine; None where none was measured.

    Calibrations are tried in their order, for the checkpoint ``digest`` and any build when None. The block of ``round``
    scales distances; without one, the law is that of the usual scale.
    """
    for measured in (one for calibration in calibrations for one in calibration.builds):
        if (measured.digest, measured.preset) == (digest, preset):
            allowed = [known for known in measured.engines if build is None or not build.differing(known)]
            if allowed or not measured.engines:
                return measured.between(allowed[0] if len(allowed) == 1 else None, None, round=round)
    return None


def find_pinned_calibration(network: NetworkPins, header: Header) -> Calibration | None:
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
            calibration.find_build(header)
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


def _kind(engine: Fingerprint) -> str:
    return f"{engine.device}, {engine.dtype}"


def _refuse_difference(measured: Mapping[str, Any], stated: Mapping[str, Any], than: str) -> None:
    """Refuse values that differ from what was measured; the error names them."""
    other = [name for name in measured if measured[name] != stated[name]]
    if other:
        raise CalibrationError(
            f"a calibration with another {' and '.join(other)} {than}: " + ", ".join(str(measured[n]) for n in other),
            wanted=", ".join(f"{name} {stated[name]}" for name in other),
            do="measure it with `assay poc calibrate A.jsonl B.jsonl`, or leave --calibration out",
        )
