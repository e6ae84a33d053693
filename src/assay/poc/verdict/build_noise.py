"""Honest noise of one build, preset and checkpoint, as a calibration file has it.

The size of the noise between two machines i and j of one build is s_ij, the median of their
residuals. All pairs share one shape, which is fitted to all of them together. The size predicted
for a new machine and a validator's machine j is

    usual_j = median over kinds k of median over machines i of kind k of s_ij.

Machines of one kind may agree far more closely than others, so the validator's own kind is left out
where another kind was measured. If machines of the new machine's kind were measured and are noisier
than usual_j, their size is taken instead; quieter ones promise nothing.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, Field, PlainValidator, TypeAdapter

from assay import stats
from assay.errors import CalibrationError
from assay.files.jsonl import JsonObject, dumps
from assay.poc.protocol.blocks import block_scale
from assay.poc.protocol.fingerprint import Fingerprint
from assay.poc.protocol.header import Header
from assay.poc.protocol.pins import Build
from assay.poc.protocol.round import Round
from assay.poc.protocol.strict_file import must
from assay.poc.verdict.control import Control
from assay.poc.verdict.honest_noise import Law, Noise, ReadLaw, ReadSpread, Scores, law_as_dict
from assay.stats.noise_laws import StrictLaw

Pair = tuple[int, int]
MIN_NONCES = 30  # that two machines have in common
FEWEST_MACHINES = 3  # that show how machines differ
MOST_ACCUSED = 1e-3
# Share of honest audits of left-out machines: on average, of one pair.
WORST_ACCUSED = 5e-3
# Kind of law by family of noise.
LAWS: dict[str, type[Law]] = {
    "distance": stats.ScaleNoise,
    **dict.fromkeys(
        ("vector", "scaled vector", "token vector", "tokens", "few tokens", "points", "few points"),
        stats.LogNoise,
    ),
}
_MEASURED = {"dtype", "seq_len"}  # fields whose value must have been measured
Index = Annotated[int, Field(ge=0)]
# Far beyond what residuals of unit vectors can have.
Size = Annotated[float, Field(ge=1e-30, le=1e3)]


@dataclass(frozen=True, kw_only=True)
class LeftOut(StrictLaw):
    """How often honest machines were accused that were left out of the measurement.

    The upper end of the interval is at least that of as many machines without an accusation,
    because few machines do not show that all others are like them.
    """

    accused: float  # share of audits that accuse
    low: (
        float  # lower end of its 95 % interval over machines (`assay.stats.grouped_share_interval`)
    )
    high: float
    worst: float  # largest share of one pair of machines
    pairs: int  # number of ordered pairs
    audits: int  # of each pair
    checked: int  # nonces of an audit

    @property
    def holds(self) -> bool:
        """Whether at most 1 audit in 1000 accuses on average, and 5 in the worst pair."""
        return self.accused <= MOST_ACCUSED and self.worst <= WORST_ACCUSED


@dataclass(frozen=True)
class Sizes:
    """Sizes of the noise between machines."""

    # Median residual by pair (i, j) with i < j; pairs with median 0 are left out.
    pairs: Mapping[Pair, float]
    kinds: tuple[str, ...] = ()  # of every machine, such as its GPU; empty where it is unknown

    @property
    def typical(self) -> float:
        """Median size over all pairs."""
        return float(np.median(list(self.pairs.values())))

    def predict(self, kind: str, validator: int | None = None) -> float:
        """Return the expected size of a new machine against a validator's machine, or any."""
        directed = {
            (i, j): size for pair, size in self.pairs.items() for i, j in (pair, pair[::-1])
        }
        against = {
            (i, j): size for (i, j), size in sorted(directed.items()) if validator in (None, j)
        }
        # The validator's machine was measured with none of these.
        if not against:
            return self.typical
        foreign = {
            pair: size
            for pair, size in against.items()
            if len({self.kinds[i] or i for i in pair}) == 2
        }
        usual = float(np.median(list(self._by_kind(foreign or against).values())))
        alike = self._by_kind(against).get(kind) if kind else None
        return usual if alike is None else max(usual, alike)

    def _by_kind(self, sizes: Mapping[Pair, float]) -> dict[str | int, float]:
        """Return the median size by kind of the first machine; a machine of unknown kind is a kind
        of its own.
        """
        sizes_of_kind: dict[str | int, list[float]] = {}
        for (i, _), size in sizes.items():
            sizes_of_kind.setdefault(self.kinds[i] or i, []).append(size)
        return {kind: float(np.median(values)) for kind, values in sizes_of_kind.items()}

    def deviations(self) -> list[float]:
        """Return ln(size / predicted) of every machine as if it were new, against every other
        machine.
        """
        deviations = list[float]()
        for i, kind in enumerate(self.kinds):
            others = replace(
                self, pairs={pair: size for pair, size in self.pairs.items() if i not in pair}
            )
            measured = {
                sum(pair) - i: size
                for pair, size in self.pairs.items()
                if i in pair and others.pairs
            }
            deviations += [
                math.log(size / others.predict(kind, j)) for j, size in sorted(measured.items())
            ]
        return deviations


def _read_pairs(values: Any) -> Sizes:
    """Read sizes; the kinds of the machines stand elsewhere in the file."""
    sizes = TypeAdapter(
        list[tuple[Index, Index, Size]], config=StrictLaw.__pydantic_config__
    ).validate_json(dumps(values))
    if not sizes or any(i >= j for i, j, _ in sizes):
        raise ValueError("sizes that are not of pairs of machines")
    return Sizes({(i, j): size for i, j, size in sizes})


# A kind is a device and a number format.
Name = Annotated[
    str, Field(max_length=4096), AfterValidator(must(str.isprintable, "a name that can be printed"))
]


@dataclass(frozen=True, kw_only=True)
class Machine(StrictLaw):
    """A machine that was measured.

    Args:
        name: Name in tables; the identity of its engine where nothing else is known.
        kind: Kind of machine, such as its GPU; empty where it is unknown.
        fingerprint: Description of its engine; None for vectors that were published without one.
    """

    name: Annotated[Name, Field(min_length=1)]
    kind: Name
    fingerprint: Annotated[
        Fingerprint | None,
        PlainValidator(lambda one: None if one is None else Fingerprint.from_dict(one)),
    ]


@dataclass(frozen=True, kw_only=True)
class MachineNoise(StrictLaw):
    """Noise of one build, fitted to pairs of machines.

    Args:
        law: Law at the typical size.
        sizes: Median residual by pair (i, j) of machines with i < j, and the kinds of the machines.
        spread: Spread of ln size of a machine that was not measured.
        known: Spread of a pair that was measured: the error of its size.
        scores: Honest residuals of all pairs, each over the size of its pair; empty in files of
            earlier releases.
        widest: Those of the pair whose shape is the widest; both are as in :class:`Noise`.
    """

    law: ReadLaw
    sizes: Annotated[Sizes, PlainValidator(_read_pairs)]
    spread: ReadSpread
    known: ReadSpread
    scores: Scores = ""
    widest: Scores = ""

    def predict_law(self, kind: str, validator: int | None = None) -> Law:
        """Return the law of a new machine of a kind against a validator's machine."""
        return self.law.scaled(self.sizes.predict(kind, validator) / self.sizes.typical)


@dataclass(frozen=True, kw_only=True)
class BuildNoise(MachineNoise):
    """Honest noise of one build, preset and checkpoint.

    A field of the fingerprint in which all measured machines agree belongs to the build, and a
    proof must agree in it too. A field in which they differ belongs to the machine and may have any
    value, but the number format must be that of a measured machine. Two machines do not show how
    machines differ, so with two only these are judged.
    """

    output: str  # family of noise that was compared: :attr:`assay.poc.Pipeline.noise`
    preset: str  # of the proofs
    digest: str | None  # SHA-256 of the tensors of the checkpoint; None for vectors without a model
    machines: Annotated[tuple[Machine, ...], Field(min_length=2, max_length=4096)]
    n: Annotated[int, Field(ge=MIN_NONCES)]  # nonces of the pair that has the fewest in common
    hidden_size: Annotated[int, Field(ge=0, le=2**20)] = (
        0  # where the law is relative to the scale of a block; else 0
    )
    effect: Annotated[float, Field(gt=1, lt=100)] | None = None  # as in `Noise`
    left_out: LeftOut | None = None  # None with fewer than three machines
    # Effective dimension of the states, from which the widths of blocks follow; None where it was
    # not measured.
    effective_dimension: Annotated[float, Field(ge=1, le=2**20)] | None = None
    control: Control | None = (
        None  # other computations of every nonce, by which the residuals are scores
    )
    limits: Name = ""  # what a law of few nonces cannot decide, in words; empty for a full one

    @property
    def engines(self) -> list[Fingerprint]:
        """The fingerprints of the measured machines."""
        return [machine.fingerprint for machine in self.machines if machine.fingerprint is not None]

    @property
    def formats(self) -> list[list[str]]:
        """The pairs of number formats that were measured, each sorted."""
        pairs = [[self.machines[row].fingerprint for row in pair] for pair in self.sizes.pairs]
        return [sorted(engine.dtype for engine in pair if engine) for pair in pairs if all(pair)]

    @property
    def identity(self) -> tuple[object, ...]:
        """What two measurements of one build have in common."""
        names = sorted(
            machine.fingerprint.id if machine.fingerprint else machine.name
            for machine in self.machines
        )
        return (
            self.preset,
            self.digest,
            tuple(names),
            self.control and (self.control.of, self.control.dtypes),
        )

    @property
    def source(self) -> str:
        """Where the law comes from, in words."""
        of_machines = (
            f" of {len(self.machines)} machines" if len(self.machines) >= FEWEST_MACHINES else ""
        )
        beside = (
            f" with a control in {' and '.join(self.control.dtypes)}"
            if self.control is not None
            else ""
        )
        quick = "quick " if self.limits else ""
        return f"{quick}calibration on {self.n} nonces{of_machines}{beside}"

    def has_control(self, controls: Collection[str], dtype: str | None) -> bool:
        """Return whether the law has a control for a validator's formats."""
        if self.control is None:
            return True
        return set(self.control.dtypes) <= set(controls) and dtype in (None, self.control.of)

    def judges(self, prover: Fingerprint) -> list[Fingerprint]:
        """Return the measured machines that may judge a prover; of a pair, the other one."""
        if not 0 < len(self.engines) < FEWEST_MACHINES:
            return self.engines
        # Without a fingerprint of one machine of a pair, its other machine is not known.
        first, *others = self.engines
        return others if prover == first else [first]

    def check_header(self, header: Header) -> None:
        """Refuse a proof of another model, preset or build than was measured."""
        if self.digest is None:
            raise CalibrationError(
                "a calibration that does not say of which model it is",
                wanted="one of this checkpoint",
                do="measure it again with --digest",
            )
        refuse_difference(
            {"preset": self.preset, "checkpoint": self.digest[:12], "output": self.output},
            {
                "preset": header.pipeline.name,
                "checkpoint": header.digest[:12],
                "output": header.pipeline.noise,
            },
            "than the proof's",
        )
        self.check_engine(header.fingerprint, "than the prover's")

    def check_engine(self, engine: Fingerprint, than: str) -> None:
        """Refuse an engine of another build; the error names the fields that differ."""
        wanted = engine.as_dict()
        measured = [fingerprint.as_dict() for fingerprint in self.engines]
        varied = {
            name for name in wanted if len({str(values[name]) for values in measured}) > 1
        } - _MEASURED
        of_build = wanted.keys() - (varied if len(measured) >= FEWEST_MACHINES else ())
        differing = [
            {
                name: value
                for name, value in values.items()
                if value != wanted[name] and name in of_build
            }
            for values in measured
        ]
        refuse_difference(min(differing, key=len, default={}), wanted, than)

    def kind_of(self, builds: Sequence[Build] | None, dtype: str) -> str:
        """Return the kind of a prover's machine if its pinned builds allow only one."""
        # A header is the prover's word, and a prover that may name its kind chooses how wide the
        # law is.
        allowed = [engine for engine in self.engines if engine.dtype == dtype]
        fitting = {
            kind_of_machine(engine)
            for engine in allowed
            for build in builds or ()
            if build.allows("device", engine.device)
        }
        return fitting.pop() if len(fitting) == 1 else ""

    def noise_between(
        self, kind: str, validator: Fingerprint | None, *, round: Round | None = None
    ) -> Noise:
        """Return the noise between a kind of prover and a validator's machine, or any when None.

        The block of ``round`` scales a law that is relative to it.
        """
        is_validator = [
            validator is not None and machine.fingerprint == validator for machine in self.machines
        ]
        alike = [
            validator is not None and machine.kind == kind_of_machine(validator)
            for machine in self.machines
        ]
        row = next((matches.index(True) for matches in (is_validator, alike) if any(matches)), None)
        measured = row is not None and len(self.machines) < FEWEST_MACHINES
        noise = Noise(
            law=self.predict_law(kind, row),
            source=self.source,
            spread=self.known if measured else self.spread,
            effect=self.effect,
            scores=self.scores,
            widest=self.widest,
            control=self.control,
        )
        if self.hidden_size and round is not None:
            return noise.scaled(block_scale(round, self.hidden_size))
        return noise

    def as_dict(self) -> JsonObject:
        """Return JSON-ready values, which :meth:`from_dict` reads back."""
        # Older files have none of these.
        later: JsonObject = {
            **({"scores": self.scores, "widest": self.widest} if self.scores else {}),
            "effective_dimension": self.effective_dimension,
            "control": self.control and asdict(self.control),
            "limits": self.limits or None,
        }
        names = ("output", "preset", "digest", "n", "hidden_size", "effect")
        return {
            **{name: value for name, value in later.items() if value is not None},
            **{name: getattr(self, name) for name in names},
            "machines": [
                vars(machine)
                | {"fingerprint": machine.fingerprint and machine.fingerprint.as_dict()}
                for machine in self.machines
            ],
            "law": law_as_dict(self.law),
            "sizes": [[i, j, size] for (i, j), size in self.sizes.pairs.items()],
            **{name: asdict(getattr(self, name)) for name in ("spread", "known")},
            "left_out": asdict(self.left_out) if self.left_out else None,
            "named": {},  # where earlier releases have laws of known cheats
        }

    @classmethod
    def from_dict(cls, values: Any) -> "BuildNoise":
        """Read what :meth:`as_dict` wrote; ValueError or AssayError if it is malformed."""
        former = ("named", "mixture")  # which earlier releases wrote
        build = TypeAdapter(cls).validate_json(
            dumps({name: value for name, value in values.items() if name not in former})
        )
        if type(build.law) is not LAWS.get(build.output):
            raise ValueError(f"a law of another kind than {build.output!r:.60} has")
        if max(j for _, j in build.sizes.pairs) >= len(build.machines):
            raise ValueError("sizes of other machines than are listed")
        kinds = tuple(machine.kind for machine in build.machines)
        return replace(build, sizes=replace(build.sizes, kinds=kinds))


def describe_machines(fingerprints: Sequence[Fingerprint]) -> tuple[Machine, ...]:
    """Return the machines with these engines."""
    return tuple(
        Machine(name=engine.id, kind=kind_of_machine(engine), fingerprint=engine)
        for engine in fingerprints
    )


def kind_of_machine(engine: Fingerprint) -> str:
    """Return the kind of a machine: its device and number format."""
    return f"{engine.device}, {engine.dtype}"


def refuse_difference(measured: Mapping[str, Any], stated: Mapping[str, Any], than: str) -> None:
    """Refuse values that differ from what was measured; the error names them."""
    differing = [name for name in measured if measured[name] != stated[name]]
    if not differing:
        return
    seen = f"a calibration with another {' and '.join(differing)} {than}: " + ", ".join(
        str(measured[n]) for n in differing
    )
    do = "measure it with `assay poc calibrate A.jsonl B.jsonl`, or leave --calibration out"
    if "dtype" in differing:
        command = "judge" if "validator" in than else "ask for a proof that was made"
        do = (
            f"{command} with --dtype {measured['dtype']}, or measure {stated['dtype']} beside it: "
            f"`assay poc calibrate --dtype` of both, or of two proofs in both"
        )
    raise CalibrationError(
        seen, wanted=", ".join(f"{name} {stated[name]}" for name in differing), do=do
    )
