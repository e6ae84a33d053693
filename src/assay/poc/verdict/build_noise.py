"""Honest noise of one build, preset and checkpoint, as a calibration file has it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

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
from assay.poc.verdict.honest_noise import Noise
from assay.poc.verdict.laws import Law, ReadLaw, ReadSpread, Scores, law_as_dict
from assay.poc.verdict.machine_sizes import Sizes
from assay.stats.noise_laws import StrictLaw

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
        engines = [machine.fingerprint for machine in self.machines]
        pairs = [(engines[i], engines[j]) for i, j in self.sizes.pairs]
        return [
            sorted((first.dtype, second.dtype))
            for first, second in pairs
            if first is not None and second is not None
        ]

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
        spread = self.known if measured else self.spread
        law = self.predict_law(kind, row)
        noise = Noise(law, self.source, spread, self.effect, self.scores, self.widest, self.control)
        if self.hidden_size and round is not None:
            return noise.scaled(block_scale(round, self.hidden_size))
        return noise

    def as_dict(self) -> JsonObject:
        """Return JSON-ready values, which :meth:`from_dict` reads back."""
        # Older files have none of these.
        values: JsonObject = {"scores": self.scores, "widest": self.widest} if self.scores else {}
        values |= (
            {}
            if self.effective_dimension is None
            else {"effective_dimension": self.effective_dimension}
        )
        values |= {} if self.control is None else {"control": asdict(self.control)}
        values |= {"limits": self.limits} if self.limits else {}
        names = ("output", "preset", "digest", "n", "hidden_size", "effect")
        engines = [
            machine.fingerprint and machine.fingerprint.as_dict() for machine in self.machines
        ]
        return values | {
            **{name: getattr(self, name) for name in names},
            "machines": [
                vars(machine) | {"fingerprint": e}
                for machine, e in zip(self.machines, engines, strict=True)
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
        of_validator = "validator" in than
        command = "judge" if of_validator else "ask for a proof that was made"
        flag = f"--dtype {measured['dtype']}"
        do = f"{command} with {flag}, or measure {stated['dtype']} beside it: `assay poc calibrate"
        do += " --dtype` of both, or of two proofs in both"
    raise CalibrationError(
        seen, wanted=", ".join(f"{name} {stated[name]}" for name in differing), do=do
    )
