"""Calibrations: the measured honest noise of builds, their file, and the noise that judges a proof.

The file holds any number of builds with any number of machines each.

The size of the noise between two machines i and j of one build is s_ij, the median of their
residuals. All pairs share one shape, which is fitted to all of them together. The size predicted
for a new machine and a validator's machine j is

    usual_j = median over kinds k of median over machines i of kind k of s_ij.

Machines of one kind may agree far more closely than others, so the validator's own kind is left out
where another kind was measured. If machines of the new machine's kind were measured and are noisier
than usual_j, their size is taken instead; quieter ones promise nothing. The spread is that of
ln(size/predicted) over machines that were left out of the measurement (:func:`spread_of_new`).

Legend of shapes: M machines, N nonces.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, Field, PlainValidator, TypeAdapter

from assay import stats
from assay.errors import AssayError, CalibrationError, ProofMismatch, UsageError
from assay.files.jsonl import JsonObject, dumps, read_json
from assay.files.storage import write_atomic
from assay.poc.protocol.blocks import block_scale
from assay.poc.protocol.pins import Build
from assay.poc.protocol.pins_file import NetworkPins
from assay.poc.protocol.pipelines import Pipeline
from assay.poc.protocol.proof import Fingerprint, Header, Proof, Record
from assay.poc.protocol.round import Round
from assay.poc.verdict.judge import compare, residuals
from assay.poc.verdict.noise import (
    ALPHA,
    Control,
    FloatArray,
    Law,
    Noise,
    ReadLaw,
    ReadSpread,
    Scores,
    bundled_noise,
    fit_noise,
    law_as_dict,
    pack_scores,
    sequential_test,
)
from assay.stats.noise_laws import Spread, StrictLaw

Pair = tuple[int, int]

KIND = "assay.poc.calibration"
SCHEMA = 2

MIN_NONCES = 30  # that two machines have in common
FEWEST_MACHINES = 3  # that show how machines differ
MOST_ACCUSED = 1e-3
WORST_ACCUSED = 5e-3  # share of honest audits of left-out machines: on average, of one pair
LAWS: dict[str, type[Law]] = {  # kind of law by family of noise
    "distance": stats.ScaleNoise,
    **dict.fromkeys(
        ("vector", "scaled vector", "token vector", "tokens", "few tokens"), stats.LogNoise
    ),
}
_MEASURED = {"dtype", "seq_len"}  # fields whose value must have been measured


@dataclass(frozen=True)
class Sizes:
    """Sizes of the noise between machines."""

    pairs: Mapping[
        Pair, float
    ]  # median residual by pair (i, j) with i < j; pairs with median 0 are left out
    kinds: tuple[str, ...] = ()  # of every machine, such as its GPU; empty where it is unknown

    @property
    def typical(self) -> float:
        """Median size over all pairs."""
        return float(np.median(list(self.pairs.values())))

    def predict(self, kind: str, validator: int | None = None) -> float:
        """Return the size to expect of a new machine of a kind against a validator's machine, or
        against any.
        """
        both = {(i, j): size for pair, size in self.pairs.items() for i, j in (pair, pair[::-1])}
        against = {(i, j): size for (i, j), size in sorted(both.items()) if validator in (None, j)}
        if not against:  # the validator's machine was measured with none of these
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
        found: dict[str | int, list[float]] = {}
        for (i, _), size in sizes.items():
            found.setdefault(self.kinds[i] or i, []).append(size)
        return {kind: float(np.median(values)) for kind, values in found.items()}

    def deviations(self) -> FloatArray:
        """Return ln(size / predicted) of every machine as if it were new, against every other
        machine.
        """
        found = []
        for i, kind in enumerate(self.kinds):
            rest = replace(
                self, pairs={pair: size for pair, size in self.pairs.items() if i not in pair}
            )
            measured = {
                sum(pair) - i: size for pair, size in self.pairs.items() if i in pair and rest.pairs
            }
            found += [
                math.log(size / rest.predict(kind, j)) for j, size in sorted(measured.items())
            ]
        return np.array(found)


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
        """Whether at most one audit in a thousand accuses on average, and five in a thousand in the
        worst pair.
        """
        return self.accused <= MOST_ACCUSED and self.worst <= WORST_ACCUSED


def _check_name(text: str) -> str:
    if not text.isprintable():
        raise ValueError("a name that cannot be printed")
    return text


def _read_pairs(values: Any) -> Sizes:
    """Read sizes; the kinds of the machines stand elsewhere in the file."""
    sizes = TypeAdapter(
        list[tuple[Index, Index, Size]], config=StrictLaw.__pydantic_config__
    ).validate_json(dumps(values))
    if not sizes or any(i >= j for i, j, _ in sizes):
        raise ValueError("sizes that are not of pairs of machines")
    return Sizes({(i, j): size for i, j, size in sizes})


Name = Annotated[
    str, Field(max_length=4096), AfterValidator(_check_name)
]  # a kind is a device and a number format
Index = Annotated[int, Field(ge=0)]
Size = Annotated[
    float, Field(ge=1e-30, le=1e3)
]  # far beyond what residuals of unit vectors can have


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
            sorted((one.dtype, other.dtype))
            for one, other in pairs
            if one is not None and other is not None
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

    def has_control(self, controls: Collection[str], own: str | None) -> bool:
        """Return whether a validator in its ``own`` format has what the law needs, with controls in
        these formats.
        """
        if self.control is None:
            return True
        return set(self.control.dtypes) <= set(controls) and own in (None, self.control.of)

    def judges(self, prover: Fingerprint) -> list[Fingerprint]:
        """Return the fingerprints of the measured machines that may judge a prover: of a pair, the
        other one.
        """
        if not 0 < len(self.engines) < FEWEST_MACHINES:
            return self.engines
        one, *others = (
            self.engines
        )  # of a pair of which one machine has no fingerprint, the other is not known
        return others if prover == one else [one]

    def check_header(self, header: Header) -> None:
        """Refuse a proof of another model, preset or build than was measured."""
        if self.digest is None:
            seen = "a calibration that does not say of which model it is"
            do = "measure it again with --digest"
            raise CalibrationError(seen, wanted="one of this checkpoint", do=do)
        stated = {
            "preset": header.pipeline.name,
            "checkpoint": header.digest[:12],
            "output": header.pipeline.noise,
        }
        measured = {"preset": self.preset, "checkpoint": self.digest[:12], "output": self.output}
        _refuse_difference(measured, stated, "than the proof's")
        self.check_engine(header.fingerprint, "than the prover's")

    def check_engine(self, engine: Fingerprint, than: str) -> None:
        """Refuse an engine of another build; the error names the fields that differ from the
        nearest measured one.
        """
        wanted = engine.as_dict()
        measured = [known.as_dict() for known in self.engines]
        varied = {
            name for name in wanted if len({str(one[name]) for one in measured}) > 1
        } - _MEASURED
        of_build = wanted.keys() - (varied if len(measured) >= FEWEST_MACHINES else ())
        differing = [
            {
                name: value
                for name, value in one.items()
                if value != wanted[name] and name in of_build
            }
            for one in measured
        ]
        _refuse_difference(min(differing, key=len, default={}), wanted, than)

    def kind_of(self, builds: Sequence[Build] | None, dtype: str) -> str:
        """Return the kind of a prover's machine: the only measured one that its pinned builds
        allow, else none.
        """
        # A header is the prover's word, and a prover that may name its kind chooses how wide the
        # law is.
        allowed = [one for one in self.engines if one.dtype == dtype]
        fitting = {
            _kind(one)
            for one in allowed
            for build in builds or ()
            if build.allows("device", one.device)
        }
        return fitting.pop() if len(fitting) == 1 else ""

    def between(
        self, kind: str, validator: Fingerprint | None, *, round: Round | None = None
    ) -> Noise:
        """Return the noise between a prover's machine of a kind and a validator's, any machine of
        the build when None.

        The block of ``round`` scales a law that is relative to it.
        """
        same = [validator is not None and one.fingerprint == validator for one in self.machines]
        alike = [validator is not None and one.kind == _kind(validator) for one in self.machines]
        row = next((found.index(True) for found in (same, alike) if any(found)), None)
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
        told: JsonObject = {"scores": self.scores, "widest": self.widest} if self.scores else {}
        told |= (
            {}
            if self.effective_dimension is None
            else {"effective_dimension": self.effective_dimension}
        )
        told |= {} if self.control is None else {"control": asdict(self.control)}
        told |= {"limits": self.limits} if self.limits else {}
        names = ("output", "preset", "digest", "n", "hidden_size", "effect")
        engines = [one.fingerprint and one.fingerprint.as_dict() for one in self.machines]
        return told | {
            **{name: getattr(self, name) for name in names},
            "machines": [
                vars(one) | {"fingerprint": e}
                for one, e in zip(self.machines, engines, strict=True)
            ],
            "law": law_as_dict(self.law),
            "sizes": [[i, j, size] for (i, j), size in self.sizes.pairs.items()],
            **{name: asdict(getattr(self, name)) for name in ("spread", "known")},
            "left_out": asdict(self.left_out) if self.left_out else None,
            "named": {},  # where earlier releases have laws of known cheats
        }

    @classmethod
    def from_dict(cls, values: Any) -> "BuildNoise":
        """Read what :meth:`as_dict` wrote; ValueError, AssayError and errors of wrong types say
        that it is not.
        """
        former = ("named", "mixture")  # which earlier releases wrote
        build = TypeAdapter(cls).validate_json(
            dumps({name: one for name, one in values.items() if name not in former})
        )
        if type(build.law) is not LAWS.get(build.output):
            raise ValueError(f"a law of another kind than {build.output!r:.60} has")
        if max(j for _, j in build.sizes.pairs) >= len(build.machines):
            raise ValueError("sizes of other machines than are listed")
        kinds = tuple(machine.kind for machine in build.machines)
        return replace(build, sizes=replace(build.sizes, kinds=kinds))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured honest noise: of one build, or of several in one file."""

    builds: tuple[BuildNoise, ...]  # the first one first tried

    def find_build(
        self, header: Header, validator: Fingerprint | None = None, controls: Collection[str] = ()
    ) -> BuildNoise:
        """Return the noise of the build that a proof was made with, and between its number format
        and a validator's.

        With ``controls``, number formats, it is a law of scores. A CalibrationError names what
        differs where no build is of the proof's model, preset and engine, or has this control.
        """
        own = None if validator is None else validator.dtype
        dtypes = None if own is None else sorted((header.fingerprint.dtype, own))
        fitting = [
            one
            for one in self.builds
            if bool(one.control) == bool(controls) and one.has_control(controls, own)
        ]
        if not fitting:
            formats = f"{own} and again in {' and '.join(controls)}"
            seen = f"a calibration without a law of nonces that are computed in {formats}"
            do = (
                "leave the control out, or measure one in these formats: `assay poc calibrate "
                "--model M`"
            )
            raise CalibrationError(seen, wanted="a law of scores by this control", do=do)
        fitting.sort(
            key=lambda one: (dtypes not in one.formats, header.fingerprint not in one.engines)
        )
        reasons = []
        for build in fitting:
            try:
                build.check_header(header)
                return build
            except CalibrationError as error:
                reasons.append(error)
        raise reasons[0]

    def control_of(self, header: Header, own: str) -> tuple[str, ...]:
        """Return the formats of the control beside a validator's own; a CalibrationError where none
        was measured.
        """
        formats = sorted((header.fingerprint.dtype, own))
        for build in self.builds:
            if build.control is not None and build.control.of == own and formats in build.formats:
                return build.control.dtypes
        seen = f"a calibration without a control for a proof in {formats[0]}, judged in {own}"
        wanted = (
            "a law of scores, which `assay poc calibrate --model M` measures where a control is a "
            "gain"
        )
        raise CalibrationError(
            seen, wanted=wanted, do="leave --control out, or measure with more number formats"
        )

    def check_kind(self, header: Header, engine: str) -> None:
        """Refuse, with a CalibrationError, an engine (``hf`` or ``vllm``) that was not measured
        beside the prover's.
        """
        kinds = {one.engine for one in self.find_build(header).judges(header.fingerprint)}
        if kinds and engine not in kinds:
            measured = " or ".join(sorted(kinds))
            seen = f"a calibration for validators on {measured}"
            do = (
                f"pass --engine {measured}, or measure this pair with `assay poc calibrate "
                f"A.jsonl B.jsonl`"
            )
            raise CalibrationError(seen, wanted=f"one for {engine}", do=do)

    def fixes_format(self, header: Header) -> bool:
        """Return whether every build of a proof's checkpoint and preset was measured in the number
        format it states.

        Where one was not, a prover that may state any format chooses the law that judges it.
        """
        plain = [one for one in self.builds if one.control is None]
        builds = [
            one
            for one in plain
            if (one.digest, one.preset) == (header.digest, header.pipeline.name)
        ]
        return all(
            header.fingerprint.dtype in {known.dtype for known in one.engines}
            for one in builds
            if one.engines
        )

    def merged(self, other: "Calibration") -> "Calibration":
        """Return a calibration with the builds of both; for a build that is in both, this one's
        measurement counts.
        """
        mine = [build.identity for build in self.builds]
        return Calibration(
            builds=(*self.builds, *(one for one in other.builds if one.identity not in mine))
        )

    def save(self, path: str | Path) -> None:
        """Write the file in one piece, replacing an older one; a StorageError where that fails."""
        builds = [build.as_dict() for build in self.builds]
        write_atomic(path, dumps({"kind": KIND, "schema": SCHEMA, "builds": builds}) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read a calibration file; a CalibrationError where the file is not a calibration."""
        try:
            values = read_json(path)
            kind = values.pop("kind", None)
            schema = values.pop("schema", None)
            if (kind, schema) != (KIND, SCHEMA):
                raise ValueError(f"kind {kind!r}, schema {schema!r}")
            if not (builds := tuple(map(BuildNoise.from_dict, values["builds"]))):
                raise ValueError("no build")
            return cls(builds=builds)
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            OverflowError,
            AssayError,
        ) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            seen = error.seen if isinstance(error, AssayError) else f"{path}: {reason}"
            wanted = f"a calibration file, schema {SCHEMA}"
            do = "write one with `assay poc calibrate`"
            raise CalibrationError(seen, wanted=wanted, do=do) from None


def describe_machines(fingerprints: Sequence[Fingerprint]) -> tuple[Machine, ...]:
    """Return the machines with these engines."""
    return tuple(Machine(name=one.id, kind=_kind(one), fingerprint=one) for one in fingerprints)


def noise_for(
    header: Header,
    validator: Fingerprint,
    calibration: Calibration | None,
    *,
    builds: Sequence[Build] | None = None,
    controls: Collection[str] = (),
) -> Noise | None:
    """Return the honest noise between the engine of a proof and that of its validator.

    Without a calibration it is that of a bundled model, and None for any other. The kind of the
    prover's machine is that of the pinned ``builds``, whatever the header says. ``controls`` are
    the number formats in which the validator computes every nonce again. A CalibrationError names
    what differs where the calibration is of another model, preset or build, or was not measured
    between these number formats.
    """
    if calibration is None:
        if controls:
            seen = "a control without a calibration"
            do = "pass --calibration, or leave the control out"
            raise CalibrationError(seen, wanted="a law of scores by this control", do=do)
        return bundled_noise(
            header.digest, header.pipeline.noise, header.fingerprint.dtype, validator.dtype
        )
    build = calibration.find_build(header, validator, controls)
    than = "than this validator's"
    build.check_engine(validator, than)
    formats = sorted((header.fingerprint.dtype, validator.dtype))
    if build.formats and formats not in build.formats and header.fingerprint != validator:
        measured = " or ".join(dict.fromkeys(" and ".join(pair) for pair in build.formats))
        seen = f"a calibration without a law between {formats[0]} and {formats[1]}"
        do = (
            "judge in one of them with --dtype, or measure this pair with `assay poc calibrate "
            "--model M`"
        )
        raise CalibrationError(
            seen, wanted=f"number formats that were measured beside each other: {measured}", do=do
        )
    judges = build.judges(header.fingerprint)
    equal = (
        header.fingerprint == validator and formats in build.formats
    )  # differs less than the pair that was measured
    if len(judges) == 1 and not equal:  # the other one of a pair
        _refuse_difference(judges[0].as_dict(), validator.as_dict(), than)
    return build.between(
        build.kind_of(builds, header.fingerprint.dtype), validator, round=header.round
    )


def find_build_noise(
    calibrations: Iterable[Calibration],
    build: Build | None,
    *,
    digest: str,
    preset: str,
    formats: tuple[str, str],
    round: Round | None,
    validator: Fingerprint,
    controls: Collection[str] = (),
) -> Noise | None:
    """Return the noise of a build, for messages that name no engine of the node; None where none
    was measured.

    ``formats`` are the number formats of the node and of the validator, which must have been
    measured together, with the ``validator``'s own engine and length. Laws come first that use more
    of the ``controls`` which it has, then calibrations in their order, for the checkpoint
    ``digest`` and any build when None. The block of ``round`` scales distances; without one, the
    law is that of the usual scale.
    """
    every = [one for calibration in calibrations for one in calibration.builds]
    for measured in sorted(every, key=lambda one: -len(one.control.dtypes if one.control else ())):
        if (measured.digest, measured.preset) != (digest, preset) or not measured.has_control(
            controls, formats[1]
        ):
            continue
        engines = measured.engines
        with suppress(
            CalibrationError
        ):  # that it was measured with other engines than the validator's
            if engines:
                measured.check_engine(
                    replace(validator, batch_size=engines[0].batch_size), "than this validator's"
                )
            allowed = [known for known in engines if build is None or not build.differing(known)]
            if (not measured.formats or sorted(formats) in measured.formats) and (
                allowed or not engines
            ):
                kind = measured.kind_of(None if build is None else [build], formats[0])
                return measured.between(kind, None, round=round)
    return None


def account_alpha(pins: NetworkPins | None, given: float | None = None) -> float:
    """Return the bound on the chance that one honest account is ever convicted: that of the pins,
    the given one, .001.

    A UsageError refuses a given one that contradicts the pins.
    """
    stated = None if pins is None or pins.network is None else pins.network.alpha
    if stated is not None and given not in (None, stated):
        do = "leave alpha out, or correct [network] of the pins"
        raise UsageError(
            f"alpha {given:g}", wanted=f"{stated:g}, as [network] of the pins says", do=do
        )
    return next((alpha for alpha in (stated, given) if alpha is not None), ALPHA)


def describe_promise(
    pins: NetworkPins, alpha: float, calibrations: Iterable[Calibration]
) -> JsonObject:
    """Return the nodes of a network, the false convictions that it accepts, alpha, and how many are
    to be expected.

    ``expected`` is the number of nodes times the larger of alpha and the upper end of the interval
    of the worst build; None where the pins state no number, or no machine was left out of a law.
    ``law_error`` says what it stands on: as far as few machines say, the upper end may be the share
    of audits that accuse a new one, of single audits under α = .001 and not of lives, where a
    noisier machine shows more.
    """
    stated: JsonObject = (
        {"nodes": None, "false_convictions": None} if pins.network is None else vars(pins.network)
    )
    builds = [build for calibration in calibrations for build in calibration.builds]
    # A law of one machine leaves out engines of that machine, and has no effect of its own.
    left = [
        build.left_out
        for build in builds
        if build.left_out is not None and build.effect is not None
    ]
    if not left or len(left) < len(builds):
        return {
            **stated,
            "alpha": alpha,
            "expected": None,
            "law_error": "unknown beyond alpha: no machine left out",
        }
    worst = max(left, key=lambda one: one.high)
    error = (
        f"{worst.low:.2%} to {worst.high:.2%} of audits of {worst.checked} nonces accuse machines "
        f"left out"
    )
    expected = stated["nodes"] and stated["nodes"] * max(alpha, worst.high)
    return {**stated, "alpha": alpha, "expected": expected, "law_error": error}


def _kind(engine: Fingerprint) -> str:
    return f"{engine.device}, {engine.dtype}"


def _refuse_difference(measured: Mapping[str, Any], stated: Mapping[str, Any], than: str) -> None:
    """Refuse values that differ from what was measured; the error names them."""
    other = [name for name in measured if measured[name] != stated[name]]
    if not other:
        return
    seen = f"a calibration with another {' and '.join(other)} {than}: " + ", ".join(
        str(measured[n]) for n in other
    )
    do = "measure it with `assay poc calibrate A.jsonl B.jsonl`, or leave --calibration out"
    if "dtype" in other:
        own = "validator" in than
        command = "judge" if own else "ask for a proof that was made"
        flag = f"--dtype {measured['dtype']}"
        do = f"{command} with {flag}, or measure {stated['dtype']} beside it: `assay poc calibrate"
        do += " --dtype` of both, or of two proofs in both"
    raise CalibrationError(
        seen, wanted=", ".join(f"{name} {stated[name]}" for name in other), do=do
    )


# Spread of ln size between machines of one build that is assumed before any was measured. It was
# chosen on sets of two quantised mixtures (docs/networks.md): machines left out lay above their
# prediction by .02 in the root mean square for one mixture, and by up to .07 for the other.
PRIOR = Spread(sd=0.03, dof=30.0)

# quantile of residuals by which the widest pair is chosen: pairs differ in shape, not in size alone
WIDTH = 0.95
AUDITS = 200  # of every left-out machine against every other one
AUDITED = 300  # nonces of such an audit, or all where fewer were measured
EFFECTS = (1.25, 1.5, 2.0, 3.0, 4.0)
_WIDEST = 0.9  # spread: beyond it nothing is known
# spread of ln size of one pair of machines between blocks, added to the error of its measurement
PAIR_SPREAD = 0.02
# spread of ln size of distances between blocks, where the law does not know the block's own scale
BLOCK_SPREAD = 0.07
SCALED_SPREAD = (
    0.03  # where the law is relative to the length of the block's folded head (block_scale.json)
)

Fit = Callable[[FloatArray], tuple[Law, float]]
Progress = Callable[[int, int], None]
Residuals = Mapping[Pair, FloatArray]
PairedProofs = Mapping[Pair, Sequence[tuple[Proof, Proof]]]
Sides = tuple[
    FloatArray, FloatArray
]  # of residuals: of the node from each computation, and between these


def calibrate(
    *proofs: Proof,
    hidden_size: int | None = None,
    controls: Sequence[str] = (),
    progress: Progress | None = None,
) -> Calibration:
    """Measure the noise of a build between the machines of honest proofs.

    Proofs of the same round are compared nonce by nonce. Every machine needs a round in common with
    another one. Two machines give the noise between these two. Three or more give a law that also
    predicts the noise of a machine that was not measured: see the head of this module. Its effect
    is the smallest at which honest machines that were left out of the measurement are not accused.

    Args:
        proofs: Honest proofs of one checkpoint and preset, one of every machine and round.
        hidden_size: Hidden size of the model, which makes a law of distances relative to the scale
            of each block; without it the law is wider.
        controls: One or two number formats. Proofs in them are no machines, but what the machine
            with the same device computes again as a validator. They give a second law, of scores,
            for each two formats where that is a gain.
        progress: Function that is called with (machines left out, machines in all).

    Raises:
        ProofMismatch: The proofs are of other checkpoints or presets, or have fewer than 30 nonces
            in common.
        UsageError: The preset decodes, or no machine has proofs of the same rounds in all formats
            of the controls.

    Example:
        >>> import assay
        >>> from assay.poc import Round
        >>> model = assay.load_model("reference:qwen3", device="cpu")
        >>> round = Round(block_hash="block_alpha", public_key="node_A", seq_len=16)
        >>> first = assay.poc.prove(model, round, range(32), batch_size=32)
        >>> second = assay.poc.prove(model, round, range(32), batch_size=16)
        >>> build = assay.poc.calibrate(first, second).builds[0]
        >>> build.n, build.preset, [machine.fingerprint.batch_size for machine in build.machines]
        (32, 'poc-2.0', [32, 16])
    """
    proofs = tuple(
        replace(one, header=replace(one.header, round=one.round.plain)) for one in proofs
    )
    machines = [proof for proof in proofs if proof.header.fingerprint.dtype not in controls]
    if len(machines) < 2:
        seen = f"{len(machines)} proof to calibrate with{' beside controls' * bool(controls)}"
        raise ProofMismatch(
            seen, wanted="two or more", do="prove the same round on another machine"
        )
    first = proofs[0].header
    check_one_checkpoint(proofs)
    if first.pipeline.steps:
        seen = f"proofs of {first.round.preset}, whose tokens part after the first that differs"
        do = (
            "judge them by the default law; research/results/decode_noise.json says how it was "
            "measured"
        )
        raise UsageError(
            seen, wanted="proofs of a preset whose values are compared nonce by nonce", do=do
        )
    pairs, fingerprints = _pair_machines(machines)
    size = hidden_size if hidden_size and first.pipeline.head == "random" else 0
    scales = {
        proof.round: block_scale(proof.round, hidden_size) if hidden_size else 1.0
        for proof in machines
    }
    measured = {
        pair: np.concatenate(
            [residuals(*_in_common(one, other)) / scales[one.round] for one, other in both]
        )
        for pair, both in pairs.items()
    }
    check_compared(measured, len(fingerprints))
    fit = partial(
        fit_build, pipeline=first.pipeline, digest=first.digest, hidden_size=size, progress=progress
    )
    builds = [fit(measured, describe_machines(fingerprints))]
    if controls:
        engines = [(proof, proof.header.fingerprint) for proof in proofs]
        again = {
            (proof.round, one.device, one.dtype): proof
            for proof, one in engines
            if one.dtype in controls
        }
        builds += _fit_scores(
            _sides_of(pairs, again, controls, scales), fingerprints, controls, fit
        )
    for build in builds:
        sequential_test(
            build.between("", None)
        )  # it refuses noise that is as large as invented values
    return Calibration(builds=tuple(builds))


def _pair_machines(proofs: Sequence[Proof]) -> tuple[PairedProofs, list[Fingerprint]]:
    """Return the proofs of the same round by pair of machines, which are engines, and their
    fingerprints.
    """
    machines: dict[tuple[Fingerprint, int], int] = {}
    rows = list[int]()
    taken = Counter[tuple[Fingerprint, Round]]()
    for proof in proofs:
        # Two proofs of one round are of two machines, even if their engines are described alike.
        engine = proof.header.fingerprint
        rows.append(machines.setdefault((engine, taken[engine, proof.round]), len(machines)))
        taken[engine, proof.round] += 1
    found: dict[Pair, list[tuple[Proof, Proof]]] = {}
    for a, b in combinations(range(len(proofs)), 2):
        if proofs[a].round == proofs[b].round:
            (i, one), (j, other) = sorted(
                [(rows[a], proofs[a]), (rows[b], proofs[b])], key=lambda pair: pair[0]
            )
            found.setdefault((i, j), []).append((one, other))
    return found, [engine for engine, _ in machines]


def _in_common(*proofs: Proof) -> list[list[Record]]:
    """Return the records of the nonces that all proofs have, of each of them."""
    records = [{record.nonce: record for record in proof.records} for proof in proofs]
    common = [nonce for nonce in records[0] if all(nonce in one for one in records)]
    return [[one[nonce] for nonce in common] for one in records]


def _sides_of(
    pairs: PairedProofs,
    again: Mapping[tuple[Round, str, str], Proof],
    controls: Sequence[str],
    scales: Mapping[Round, float],
) -> dict[Pair, Sides]:
    """Return residuals of nodes, [E, N], and between computations of validators, [P, N], by node
    and validator.
    """
    found = {}
    for (i, j), both in pairs.items():
        for pair, proofs in (((i, j), both), ((j, i), [two[::-1] for two in both])):
            parts = []
            for node, validator in proofs:
                # A control of another device would be further from the first computation than the
                # validator's own is.
                wanted = [
                    (node.round, validator.header.fingerprint.device, name) for name in controls
                ]
                if all(one in again for one in wanted):
                    received, *own = _in_common(node, validator, *(again[one] for one in wanted))
                    parts.append([side / scales[node.round] for side in compare(received, own)])
            if sum(node_EN.shape[1] for node_EN, _ in parts) >= MIN_NONCES:
                found[pair] = (
                    np.hstack([node_EN for node_EN, _ in parts]),
                    np.hstack([own_PN for _, own_PN in parts]),
                )
    return found


def _fit_scores(
    found: Mapping[Pair, Sides],
    engines: Sequence[Fingerprint],
    controls: Sequence[str],
    fit: Callable[..., BuildNoise],
) -> Iterator[BuildNoise]:
    """Yield a law of scores for each two number formats, of nodes and of validators, for which a
    control is a gain.
    """
    if not found or len(controls) > 2:
        seen = (
            f"controls in {' and '.join(controls)}, for "
            f"{'too many formats' if found else 'no machine'}"
        )
        wanted = (
            f"one or two, in which a device that validates has {MIN_NONCES} nonces of another "
            f"machine's round"
        )
        do = "prove these rounds again in these formats, on a machine that validates"
        raise UsageError(seen, wanted=wanted, do=do)
    for formats in product(dict.fromkeys(engine.dtype for engine in engines), repeat=2):
        chosen: dict[Pair, Sides] = {}
        for pair, sides in found.items():
            if tuple(engines[row].dtype for row in pair) == formats:
                chosen.setdefault((min(pair), max(pair)), sides)
        control = Control.measured([*chosen.values()], of=formats[1], dtypes=controls)
        if control is not None:
            rows = sorted({row for pair in chosen for row in pair})
            scores = {
                (rows.index(i), rows.index(j)): control.scores(*sides)
                for (i, j), sides in chosen.items()
            }
            yield fit(scores, describe_machines([engines[row] for row in rows]), control=control)


def check_one_checkpoint(proofs: Sequence[Proof]) -> None:
    """Refuse proofs of several checkpoints or presets."""
    headers = [proof.header for proof in proofs]
    if (
        len(
            {
                (header.digest, header.weights, header.frame, header.pipeline.name)
                for header in headers
            }
        )
        > 1
    ):
        wanted = "honest proofs of one checkpoint, frame and preset"
        do = "calibrate every checkpoint and preset by itself; --merge puts them into one file"
        raise ProofMismatch(
            "proofs of different presets, checkpoints or frames", wanted=wanted, do=do
        )


def check_compared(measured: Residuals, machines: int) -> None:
    """Refuse residuals by pair where a pair has fewer than 30 nonces, or one of the machines is in
    no pair.
    """
    fewest = min((errors.size for errors in measured.values()), default=0)
    compared = {i for pair in measured for i in pair}
    if fewest < MIN_NONCES or len(compared) < machines:
        seen = (
            f"proofs with {fewest} nonces in common"
            if measured
            else "proofs of different rounds or checkpoints"
        )
        wanted = f"proofs of one round and checkpoint, with at least {MIN_NONCES} nonces in common"
        raise ProofMismatch(
            seen,
            wanted=wanted,
            do="prove the same round on all engines, for instance --nonces 0:256",
        )


def fit_build(
    measured: Residuals,
    machines: tuple[Machine, ...],
    pipeline: Pipeline,
    *,
    progress: Progress | None = None,
    **known: Any,
) -> BuildNoise:
    """Fit the noise of a build to the residuals of its pairs, those of distances over the scale of
    each block.

    With a ``control``, ``measured`` has the scores that it gives. What is ``known`` are fields of
    :class:`BuildNoise`: ``digest``, ``hidden_size``, ``effective_dimension`` and ``control``.
    """
    of_distances = SCALED_SPREAD if known.get("hidden_size") else BLOCK_SPREAD
    between = of_distances if pipeline.output == "distance" else PAIR_SPREAD
    fit = partial(fit_noise, pipeline)
    kinds = [machine.kind for machine in machines]
    effect, left_out = leave_out(measured, kinds, fit, between_blocks=between, progress=progress)
    known |= vars(fit_machines(measured, kinds, fit, between_blocks=between))
    known |= {
        "output": pipeline.noise,
        "preset": pipeline.name,
        "n": min(map(np.size, measured.values())),
    }
    return BuildNoise(machines=machines, effect=effect, left_out=left_out, **known)


def fit_machines(
    residuals: Residuals, kinds: Sequence[str], fit: Fit, *, between_blocks: float = PAIR_SPREAD
) -> MachineNoise:
    """Fit the noise of a build to the residuals [N] of pairs (i, j) of machines with i < j.

    ``kinds`` has the kind of every machine, empty where it is unknown. ``between_blocks`` is the
    spread of ln size of one pair between blocks.
    """
    size = {pair: float(np.median(np.abs(errors_N))) for pair, errors_N in residuals.items()}
    some = {pair: value for pair, value in size.items() if value > 0}
    if (
        not some
    ):  # machines that mostly agree to the bit; the rare nonces on which they do not price the bets
        every_N = np.concatenate(list(residuals.values()))
        law, _ = fit(every_N)
        if (
            law.magnitudes(every_N).max() < law.size
        ):  # under equal bits alone, no cap of a bet is better than another
            every_N = np.full_like(every_N, law.size)
        sizes = Sizes(dict.fromkeys(size, law.size), tuple(kinds))
        return MachineNoise(
            law=law, sizes=sizes, spread=PRIOR, known=PRIOR, scores=pack_scores(every_N, law)
        )
    sizes = Sizes(some, tuple(kinds))
    alike = [residuals[pair] * (sizes.typical / value) for pair, value in some.items()]
    pooled_N = np.concatenate(alike)
    law, error = fit(pooled_N)
    error *= math.sqrt(
        pooled_N.size / min(one_N.size for one_N in alike)
    )  # of the size of one pair
    known = min(math.hypot(error, between_blocks), _WIDEST)
    new = spread_of_new(sizes.deviations(), len({i for pair in some for i in pair}), known)
    widest = max(alike, key=lambda errors_N: float(np.quantile(np.abs(errors_N), WIDTH)))
    prices = {"scores": pack_scores(pooled_N, law), "widest": pack_scores(widest, law)}
    return MachineNoise(law=law, sizes=sizes, spread=new, known=Spread(known, PRIOR.dof), **prices)


def spread_of_new(deviations: Iterable[float], machines: int, *errors: float) -> Spread:
    """Return the spread of ln size of a machine that was not measured, from ln(size/predicted) of
    machines left out.

    It is the root mean square of those above their prediction, because only larger noise can
    accuse, combined with :data:`PRIOR` and the errors of the measurement.
    """
    upwards = [deviation for deviation in deviations if deviation > 0]
    squares = (machines - 1) * float(np.mean(np.square(upwards))) if upwards else 0.0
    dof = PRIOR.dof + machines - 1
    between = math.sqrt((PRIOR.dof * PRIOR.sd**2 + squares) / dof)
    return Spread(min(math.hypot(between, *errors), _WIDEST), dof)


def leave_out(
    residuals: Residuals,
    kinds: Sequence[str],
    fit: Fit,
    *,
    audits: int = AUDITS,
    between_blocks: float = PAIR_SPREAD,
    progress: Progress | None = None,
) -> tuple[float | None, LeftOut | None]:
    """Return the smallest effect at which machines left out are not accused, and how often they are
    accused then.

    Every machine is left out once. Its audits against every other machine draw nonces without
    replacement, and are judged by the law that the other machines give. If no effect is large
    enough, the last one is returned. With fewer than three machines both values are None.
    ``audits`` is the number of every ordered pair, and the other arguments are those of
    :func:`fit_machines`.
    """
    if len(kinds) < FEWEST_MACHINES:
        return None, None
    checked = min(AUDITED, *(errors_N.size for errors_N in residuals.values()))
    for effect in EFFECTS:
        rng = np.random.default_rng(0)
        shares = list[float]()
        left = list[int]()
        for machine in range(len(kinds)):
            rest = {pair: errors_N for pair, errors_N in residuals.items() if machine not in pair}
            mine = {
                pair: errors_N
                for pair, errors_N in residuals.items()
                if machine in pair and errors_N.any()
            }
            if rest and mine:
                noise = fit_machines(rest, kinds, fit, between_blocks=between_blocks)
            for pair, errors_N in mine.items() if rest else ():
                law = noise.predict_law(kinds[machine], pair[0] if pair[1] == machine else pair[1])
                test = sequential_test(
                    Noise(law, "left out", noise.spread, effect, noise.scores, noise.widest)
                )
                drawn = [rng.permutation(errors_N)[:checked] for _ in range(audits)]
                shares.append(float(test.accusations(np.stack(drawn))[:, -1].mean()))
                left.append(machine)
            if progress:
                progress(machine + 1, len(kinds))
        if not shares:
            return None, None
        low, high = stats.grouped_share_interval(shares, left)
        found = {"accused": float(np.mean(shares)), "low": low, "high": high, "worst": max(shares)}
        left_out = LeftOut(**found, pairs=len(shares), audits=audits, checked=checked)
        if left_out.holds:
            break
    return effect, left_out
