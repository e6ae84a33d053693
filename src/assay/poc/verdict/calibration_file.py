"""Calibration files: builds with their machines, and the noise law for a proof."""

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from assay.errors import AssayError, CalibrationError, DataError, UsageError
from assay.files.jsonl import JsonObject, dumps, read_json
from assay.files.storage import write_atomic
from assay.poc.protocol.fingerprint import Fingerprint
from assay.poc.protocol.header import Header
from assay.poc.protocol.pins import Build
from assay.poc.protocol.pins_file import NetworkPins
from assay.poc.protocol.round import Round
from assay.poc.verdict.build_noise import BuildNoise, refuse_difference
from assay.poc.verdict.honest_noise import Noise, bundled_noise
from assay.poc.verdict.sample_plan import ALPHA

KIND = "assay.poc.calibration"
SCHEMA = 2


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured honest noise: of one build, or of several in one file."""

    builds: tuple[BuildNoise, ...]  # the first one first tried

    def find_build(
        self, header: Header, validator: Fingerprint | None = None, controls: Collection[str] = ()
    ) -> BuildNoise:
        """Return the noise of a proof's build, between its format and a validator's.

        With ``controls``, number formats, it is a law of scores. A CalibrationError names what
        differs where no build is of the proof's model, preset and engine, or has this control.
        """
        own_dtype = None if validator is None else validator.dtype
        dtypes = None if own_dtype is None else sorted((header.fingerprint.dtype, own_dtype))
        fitting = [
            build_noise
            for build_noise in self.builds
            if bool(build_noise.control) == bool(controls)
            and build_noise.has_control(controls, own_dtype)
        ]
        if not fitting:
            formats = f"{own_dtype} and again in {' and '.join(controls)}"
            raise CalibrationError(
                f"a calibration without a law of nonces that are computed in {formats}",
                wanted="a law of scores by this control",
                do="leave the control out, or measure one in these formats: `assay poc calibrate "
                "--model M`",
            )
        reasons = []
        # First what measured both formats, then what measured this very engine.
        for build in sorted(
            fitting,
            key=lambda build_noise: (
                dtypes not in build_noise.formats,
                header.fingerprint not in build_noise.engines,
            ),
        ):
            try:
                build.check_header(header)
                return build
            except CalibrationError as error:
                reasons.append(error)
        raise reasons[0]

    def control_of(self, header: Header, judging_dtype: str) -> tuple[str, ...]:
        """Return the control formats beside a validator's own; a CalibrationError without any."""
        formats = sorted((header.fingerprint.dtype, judging_dtype))
        for build in self.builds:
            if (
                build.control is not None
                and build.control.of == judging_dtype
                and formats in build.formats
                and (build.digest, build.preset) == (header.digest, header.pipeline.name)
            ):
                return build.control.dtypes
        raise CalibrationError(
            f"a calibration without a control for a proof in {formats[0]}, judged in "
            f"{judging_dtype}",
            wanted="a law of scores, which `assay poc calibrate --model M` measures where a "
            "control is a gain",
            do="leave --control out, or measure with more number formats",
        )

    def check_kind(self, header: Header, engine: str) -> None:
        """Refuse an engine, ``hf`` or ``vllm``, that was not measured beside the prover's."""
        kinds = {
            engine_known.engine
            for engine_known in self.find_build(header).judges(header.fingerprint)
        }
        if kinds and engine not in kinds:
            measured = " or ".join(sorted(kinds))
            raise CalibrationError(
                f"a calibration for validators on {measured}",
                wanted=f"one for {engine}",
                do=f"pass --engine {measured}, or measure this pair with `assay poc calibrate "
                f"A.jsonl B.jsonl`",
            )

    def fixes_format(self, header: Header) -> bool:
        """Return whether all builds of a proof's model and preset were measured in its format.

        Where one was not, a prover that may state any format chooses the law that judges it.
        """
        return all(
            header.fingerprint.dtype in {engine.dtype for engine in build.engines}
            for build in self.builds
            if build.control is None
            and build.engines
            and (build.digest, build.preset) == (header.digest, header.pipeline.name)
        )

    def merged(self, other: "Calibration") -> "Calibration":
        """Return a calibration with the builds of both; this one's measurement has priority."""
        mine = [build.identity for build in self.builds]
        return Calibration(
            builds=(
                *self.builds,
                *(build_noise for build_noise in other.builds if build_noise.identity not in mine),
            )
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
            reason = f"no {error}" if isinstance(error, KeyError) else getattr(error, "seen", error)
            raise CalibrationError(
                # What cannot be read is called by its path already.
                str(reason) if isinstance(error, DataError) else f"{path}: {reason}",
                wanted=f"a calibration file, schema {SCHEMA}",
                do="write one with `assay poc calibrate`",
            ) from None


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
            raise CalibrationError(
                "a control without a calibration",
                wanted="a law of scores by this control",
                do="pass --calibration, or leave the control out",
            )
        return bundled_noise(
            header.digest, header.pipeline.noise, header.fingerprint.dtype, validator.dtype
        )
    build = calibration.find_build(header, validator, controls)
    than = "than this validator's"
    build.check_engine(validator, than)
    formats = sorted((header.fingerprint.dtype, validator.dtype))
    if build.formats and formats not in build.formats and header.fingerprint != validator:
        measured = " or ".join(dict.fromkeys(" and ".join(pair) for pair in build.formats))
        raise CalibrationError(
            f"a calibration without a law between {formats[0]} and {formats[1]}",
            wanted=f"number formats that were measured beside each other: {measured}",
            do="judge in one of them with --dtype, or measure this pair with `assay poc calibrate "
            "--model M`",
        )
    judges = build.judges(header.fingerprint)
    # Differs less than the pair that was measured.
    equal = header.fingerprint == validator and formats in build.formats
    if len(judges) == 1 and not equal:  # the other one of a pair
        refuse_difference(judges[0].as_dict(), validator.as_dict(), than)
    return build.noise_between(
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
    """Return the noise of a build for messages that name no engine; None if not measured.

    ``formats`` are the number formats of the node and of the validator, which must have been
    measured together, with the ``validator``'s own engine and length. Laws come first that use more
    of the ``controls`` which it has, then calibrations in their order, for the checkpoint
    ``digest`` and any build when None. The block of ``round`` scales distances; without one, the
    law is that of the usual scale.
    """
    fitting = [
        build_noise
        for calibration in calibrations
        for build_noise in calibration.builds
        if (build_noise.digest, build_noise.preset) == (digest, preset)
        and build_noise.has_control(controls, formats[1])
    ]
    for measured in sorted(
        fitting,
        key=lambda build_noise: -len(build_noise.control.dtypes if build_noise.control else ()),
    ):
        engines = measured.engines
        # Suppress the refusal of a law that was measured with other engines.
        with suppress(CalibrationError):
            if engines:
                measured.check_engine(
                    replace(validator, batch_size=engines[0].batch_size), "than this validator's"
                )
            allowed = [engine for engine in engines if build is None or not build.differing(engine)]
            if (not measured.formats or sorted(formats) in measured.formats) and (
                allowed or not engines
            ):
                kind = measured.kind_of(None if build is None else [build], formats[0])
                return measured.noise_between(kind, None, round=round)
    return None


def account_alpha(pins: NetworkPins | None, own_alpha: float | None = None) -> float:
    """Return the lifetime false-positive rate of one account: from pins, settings, or .001.

    A UsageError refuses a given one that contradicts the pins.
    """
    stated = None if pins is None or pins.network is None else pins.network.alpha
    if stated is not None and own_alpha not in (None, stated):
        raise UsageError(
            f"alpha {own_alpha:g}",
            wanted=f"{stated:g}, as [network] of the pins says",
            do="leave alpha out, or correct [network] of the pins",
        )
    return next((alpha for alpha in (stated, own_alpha) if alpha is not None), ALPHA)


def describe_promise(
    pins: NetworkPins, alpha: float, calibrations: Iterable[Calibration]
) -> JsonObject:
    """Return a network's nodes, accepted false convictions, alpha, and the expected number.

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
    shares_left_out = [
        build.left_out
        for build in builds
        if build.left_out is not None and build.effect is not None
    ]
    if not shares_left_out or len(shares_left_out) < len(builds):
        return {
            **stated,
            "alpha": alpha,
            "expected": None,
            "law_error": "unknown beyond alpha: no machine left out",
        }
    worst = max(shares_left_out, key=lambda result: result.high)
    error = (
        f"{worst.low:.2%} to {worst.high:.2%} of audits of {worst.checked} nonces accuse machines "
        f"left out"
    )
    expected = stated["nodes"] and stated["nodes"] * max(alpha, worst.high)
    return {**stated, "alpha": alpha, "expected": expected, "law_error": error}
