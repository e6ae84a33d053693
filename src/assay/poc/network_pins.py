"""Pins files in use: what they require of a node and a validator, and how one is written.

Values that are given beside a file, by options or a configuration file, must agree with it.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay.errors import CalibrationError, ProofMismatch, UsageError
from assay.files.references import CATALOGUE
from assay.files.storage import write_atomic
from assay.files.toml import LONGEST_TOML, parse_toml
from assay.poc.launch import Proving
from assay.poc.protocol.checks import check_name, check_positions
from assay.poc.protocol.fingerprint import Fingerprint
from assay.poc.protocol.header import Header
from assay.poc.protocol.pins import Build, Pins, describe_build, nearest_build, of_weights
from assay.poc.protocol.pins_file import (
    BUILD_FIELDS,
    UNFILLED,
    Accepted,
    NetworkPins,
    PinnedFile,
    pins_text,
)
from assay.poc.protocol.pipelines import check_frame_file, get_pipeline
from assay.poc.protocol.proof import Proof
from assay.poc.protocol.round import Round
from assay.poc.verdict.calibration_file import Calibration
from assay.poc.verdict.honest_noise import bundled_noise

if TYPE_CHECKING:
    from assay.models.model import Model
    from assay.poc.engines.base import Engine


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a node is asked to prove.

    Args:
        round: Round of the node.
        nonces: Nonces of the proof.
        proving: Model and engine.
        pins: What the network agreed on; None without a pins file.
        has_law: Whether the pins file names a calibration of the model.
    """

    round: Round
    nonces: range
    proving: Proving
    pins: Pins | None
    has_law: bool = False

    def check_engine(self, model: "Model", engine: "Engine") -> None:
        """Refuse a checkpoint or build that the network did not agree on, before computing.

        Raises:
            ProofMismatch: Names the first value that differs.
        """
        if self.pins is None:
            return
        if (model.digest, model.weights) != (self.pins.digest, self.pins.weights):
            raise ProofMismatch(
                f"{model.reference} ({model.weights}, {model.digest[:12]})",
                wanted=f"the checkpoint of the pins ({self.pins.weights}, "
                f"{(self.pins.digest or '')[:12]})",
                do="pass the model that the network agreed on",
                field="model",
            )
        build, odd = nearest_build(self.pins.builds or (), engine.fingerprint)
        if odd:
            raise ProofMismatch(
                f"an engine with {odd[0]} {getattr(engine.fingerprint, odd[0])!s:.60}",
                wanted=f"{odd[0]} {' or '.join(map(str, getattr(build, odd[0])))}, as the pins say",
                do="prove on a build that the network agreed on",
                field=odd[0],
            )

    def missing_law(self, model: "Model", engine: "Engine") -> str:
        """Return the warning of a checkpoint without a law; empty where it has one."""
        dtype = engine.fingerprint.dtype
        noise = get_pipeline(self.round.preset).noise
        if self.has_law or bundled_noise(model.digest, noise, dtype, dtype) is not None:
            return ""
        flags = (
            f"--model {shlex.quote(model.reference)} --quick --preset {self.round.preset} "
            f"--seq-len {self.round.seq_len}"
        )
        return (
            f"no law of checkpoint {model.digest[:12]} comes with assay or is pinned, so without "
            f"one verdicts are undecided: `assay poc calibrate {flags} --dtype {dtype} --pins "
            f"pins.toml -o law.json`"
        )


def asked(
    file: Path | None,
    proving: Proving,
    stated: Mapping[str, Any],
    positions: tuple[int, int] | None,
) -> Asked:
    """Return what a node is asked to prove, by a pins file and by what is given beside it.

    Without a model, or with its digest, ``proving`` runs that of the file. ``stated`` has the
    values of the round that are given, and those of ``dtype``, ``engine`` and ``batch_size``. The
    positions in the share are those of the file, else the first 256.

    Raises:
        UsageError: A value is missing, out of range, or contradicts the file.
        DataError: The file cannot be read.
    """
    values = {name: value for name, value in stated.items() if name in Round.__dataclass_fields__}
    if file is None:
        for name in ("model", "block_hash", "public_key"):
            if not (values | {"model": proving.model}).get(name):
                raise UsageError(
                    f"no {_flag(name)}",
                    wanted=f"a {name.replace('_', ' ')}",
                    do=f"pass {_flag(name)}, or --pins",
                )
        values.setdefault("preset", proving.preset)
        if "preset" not in stated and get_pipeline(proving.preset).framed and proving.frame is None:
            raise _no_frame(proving)
        round = Round(**values)
        pins = None
        has_law = False
        positions = positions or (0, 256)
        formats = get_pipeline(round.preset).number_formats
        proving = replace(proving, dtype=proving.dtype or next(iter(formats), None))
    else:
        network = NetworkPins.load(file)
        # The catalogue says what the weights of a bundled model are, before torch is imported. Of a
        # directory only its digest can say later which model of the file it is.
        known = CATALOGUE.get(proving.model, {}).get("digest")
        named = known is not None or any(
            proving.model in (pinned_model.reference, pinned_model.digest)
            for pinned_model in network.models
        )
        is_pinned = known in {pinned_model.digest for pinned_model in network.models}
        entry = network.model(known if is_pinned else proving.model if named else None)
        has_law = bool(entry.calibrations)
        pins = network.for_round(model=entry.digest, also=Pins(**values))
        if pins.block_hash is None or pins.public_key is None:
            flag = _flag("block_hash" if pins.block_hash is None else "public_key")
            raise UsageError(
                f"no {flag} beside {file}", wanted="the value of this round", do=f"pass {flag}"
            )
        round_values = {
            name: value
            for name in Round.__dataclass_fields__
            if (value := getattr(pins, name)) is not None
        }
        round, positions = Round(**round_values), positions or network.round.nonces or (0, 256)
        # A digest says which model of the file is meant, and loads none.
        if proving.model in ("", entry.digest):
            proving = replace(proving, model=entry.reference)
        if proving.frame is None and get_pipeline(round.preset).framed:
            proving = replace(proving, frame=network.frame(entry.digest))
        proving = _pinned_engine(proving, pins, stated, file)
    nonces = round.nonces(*positions)
    if pins is not None and pins.nonces is not None and list(pins.nonces) != list(nonces):
        raise _beside(
            "nonces", f"{nonces[0]} to {nonces[-1]}", f"{pins.nonces[0]} to {pins.nonces[-1]}", file
        )
    if pins is not None and pins.nonces is None and len(nonces) < (pins.fewest_nonces or 0):
        raise _beside("nonces", f"{len(nonces)} in all", f"{pins.fewest_nonces} or more", file)
    proving = replace(proving, preset=get_pipeline(round.preset).name, seq_len=round.seq_len)
    round = replace(round, preset=proving.preset)
    return Asked(round=round, nonces=nonces, proving=proving, pins=pins, has_law=has_law)


def _no_frame(proving: Proving) -> UsageError:
    """Return the error of a model that is proved without what its network agreed on."""
    model = shlex.quote(proving.model)
    return UsageError(
        f"{proving.model} without --pins, --frame or --preset",
        wanted=f"what the network of the model agreed on: {proving.preset}, its usual preset, "
        f"reads a frame",
        do=f"measure a law once, `assay poc calibrate --model {model} --quick --pins pins.toml -o "
        f"law.json`, and pass --pins pins.toml; or --preset poc-2.0 for the published preset",
    )


def _pinned_engine(
    proving: Proving, pins: Pins, stated: Mapping[str, Any], file: Path | None
) -> Proving:
    """Return an engine that is one of the builds, as far as that can be said before it is
    started.
    """
    builds = pins.builds or ()
    allowed: dict[str, Sequence[Any]] = {
        "engine": [name for build in builds for name in build.engine],
        "batch_size": [size for build in builds for size in build.batch_size],
        "dtype": [*dict.fromkeys(of_weights(dtype) for build in builds for dtype in build.dtype)],
    }
    for name, choices in allowed.items():
        value = getattr(proving, name)
        if (
            not choices
            or "*" in choices
            or value in choices
            or (name, value) == ("batch_size", "auto")
        ):
            continue
        if name in stated:
            raise _beside(name, value, " or ".join(map(str, choices)), file)
        proving = replace(proving, **{name: choices[0]})
    return proving


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _beside(name: str, value: object, wanted: str, file: Path | None) -> UsageError:
    return UsageError(
        f"{_flag(name)} {value} beside {file}",
        wanted=f"{wanted}, as the network agreed there",
        do="leave it out, or correct one of the two",
        field=name,
    )


def pinned_format(pins: Path, model: str) -> str | None:
    """Return the number format of a model's weights in the pins; None if they name several."""
    network = NetworkPins.load(pins)
    chosen = network.model(model if len(network.models) > 1 else None)
    formats = {of_weights(dtype) for build in chosen.builds for dtype in build.dtype}
    return formats.pop() if len(formats) == 1 else None


def write_pins(
    output: Path,
    model: str,
    *,
    round_values: Mapping[str, Any],
    proofs: Sequence[Path] = (),
    calibrations: Sequence[Path] = (),
    public_keys: Sequence[str] = (),
    dtype: str | None = None,
    frame: Path | None = None,
    engine: Fingerprint | None = None,
    false_convictions: str | None = None,
) -> dict[str, Any]:
    """Write a pins file for a model; values that only a proof can supply are left to fill in.

    The model is hashed and not run. ``round_values`` has the values of the round: strength,
    node_count and fewest_nonces, and preset, seq_len and r_target, which are those of the honest
    proofs, or the published ones, when None. Builds are those of the proofs, or of the ``engine``
    that was calibrated; ``dtype`` is the number format where neither says one. Without keys any
    node may prove. ``frame`` is the file of the checkpoint's frame, which makes ``tokens-1`` the
    default preset. ``false_convictions`` are those that the network accepts, over its nodes: K/N.

    Raises:
        UsageError: A value is out of range, or the proofs are of different rounds.
        ProofMismatch: A proof is of another checkpoint.
        CalibrationError: A calibration is of none of the proofs, or of another model or preset.
    """
    for key in public_keys:
        check_name("public_key", key, do="pass --public-key as the chain prints it")
    accepted = Accepted.read(false_convictions)
    headers = [Proof.load(path).header for path in proofs]
    if frame is not None and round_values["preset"] is None and not headers:
        round_values = {**round_values, "preset": "tokens-1"}
    round = _round(round_values, headers)
    check_frame_file(get_pipeline(round["preset"]), frame)
    Pins(prover_dtype=dtype)  # an error names the formats
    builds = (
        _builds(dtype, headers, round["preset"]) if engine is None else [describe_build(engine)]
    )
    measured = [_read_calibration(path, headers) for path in calibrations]
    # The default is one to be changed in the file.
    length = round_values["seq_len"]
    steps = get_pipeline(round["preset"]).steps
    if length is not None:
        check_positions(model, None, seq_len=length, steps=steps)
    # Imported when nothing more can be refused without it.
    from assay.models.catalogue import model_info
    from assay.models.load import identify

    if length is not None:
        check_positions(model, model_info(model).max_positions, seq_len=length, steps=steps)
    # In which dtype it would run does not matter.
    digest = identify(model, dtype="float32").with_frame(frame).digest
    for path, header in zip(proofs, headers, strict=True):
        if (header.digest, header.weights) != (digest, "trained"):
            raise ProofMismatch(
                f"{path}: a proof of {header.round.model:.80} ({header.weights}, "
                f"{header.digest[:12]})",
                wanted=f"one of {model} (trained, {digest[:12]})",
                do="pass the proof of a node that ran this checkpoint",
            )
    for path, calibration in zip(calibrations, measured, strict=True):
        of_builds = {(build.digest, build.preset) for build in calibration.builds}
        if (digest, round["preset"]) not in of_builds:
            raise CalibrationError(
                f"{path}: a calibration of another checkpoint or preset",
                wanted=f"one of {model} ({digest[:12]}) with preset {round['preset']}",
                do=f"measure one: assay poc calibrate --model M --preset {round['preset']}",
            )
    # At 42 bytes each, more of them are longer than any file that is read.
    shares = islice(
        ((key, share) for key in public_keys for share in range(round["node_count"])),
        LONGEST_TOML // 32,
    )
    files = [PinnedFile.of(path, output.parent) for path in calibrations]
    tables: list[tuple[str, Mapping[str, object]]] = [
        *([("[network]", accepted.model_dump())] if accepted else []),
        ("[round]", round),
        *(("[[nodes]]", {"public_key": key, "node_id": share}) for key, share in shares),
        ("[[models]]", {"reference": model, "digest": digest}),
        *([("[models.frame]", PinnedFile.of(frame, output.parent).model_dump())] if frame else []),
        *(("[[models.builds]]", build) for build in builds),
        *(("[[models.calibrations]]", file.model_dump()) for file in files),
    ]
    text = pins_text(tables)
    if (size := len(text.encode())) > LONGEST_TOML:
        raise UsageError(
            f"a pins file of {size} bytes",
            wanted=f"{LONGEST_TOML} at most, the longest that is read",
            do="pass fewer --public-key, or a smaller node_count",
        )
    unfilled = [
        f"models[0].builds[0].{name}" for name, value in builds[0].items() if value == UNFILLED
    ]
    if not unfilled:
        # A file that this version writes is one that it reads; an older one stays until then.
        NetworkPins.of(parse_toml(text), output)
    write_atomic(output, text)
    return {
        "path": str(output),
        "model": model,
        "digest": digest,
        **{name: round[name] for name in ("preset", "seq_len", "strength")},
        "builds": len(builds) if headers or engine else 0,
        "calibrations": len(files),
        "to_fill_in": ", ".join(unfilled) or "nothing",
    }


def _round(chosen: Mapping[str, Any], headers: Sequence[Header]) -> dict[str, Any]:
    """Return the values of the round: those of the flags, else of the proofs, else the published
    ones.
    """
    values: dict[str, Any] = {}
    for name in ("preset", "seq_len", "r_target"):
        stated = {getattr(header.round, name) for header in headers}
        if chosen[name] is None and len(stated) > 1:
            raise UsageError(
                f"proofs with {name} {' and '.join(map(str, sorted(stated))):.80}",
                wanted="proofs of one kind of round",
                do=f"pass {_flag(name)}",
            )
        values[name] = (
            chosen[name] if chosen[name] is not None else next(iter(stated), getattr(Round, name))
        )
    values |= {name: chosen[name] for name in ("strength", "node_count", "fewest_nonces")}
    values["preset"] = get_pipeline(values["preset"]).name
    if get_pipeline(values["preset"]).output != "distance":
        del values["r_target"]  # only a distance has a target
    # An error says which value is out of range.
    Pins(**values)
    return values


def _builds(dtype: str | None, headers: Sequence[Header], preset: str) -> list[dict[str, Any]]:
    """Return the builds of the proofs, or one that is to be filled in."""
    if headers and dtype is not None:
        raise UsageError(
            f"--dtype {dtype} beside --from-proof",
            wanted="one of the two: the number format of a build is that of its proof",
            do="leave --dtype out",
        )
    for header in headers:
        # An error says what is no build.
        Build.of(header.fingerprint)
    agreed = [dtype] if dtype else [*get_pipeline(preset).number_formats, UNFILLED]
    empty = dict.fromkeys(BUILD_FIELDS, UNFILLED) | {"dtype": agreed[0]}
    return [describe_build(header.fingerprint) for header in headers] or [empty]


def _read_calibration(path: Path, headers: Sequence[Header]) -> Calibration:
    """Return a calibration; one of none of the proofs is refused."""
    measured = Calibration.load(path)
    reasons = []
    for header in headers:
        try:
            measured.find_build(header)
        except CalibrationError as error:
            reasons.append(error)
    if headers and len(reasons) == len(headers):
        raise reasons[0]
    return measured


def find_pinned_calibration(network: NetworkPins, header: Header) -> Calibration | None:
    """Return the first pinned calibration measured with the proof's preset and build.

    It is None where the network pins none for this model, so that the stated default holds.

    Raises:
        CalibrationError: There are calibrations, and none is of this proof: a wider law must not
            take its place.
        DataError: A file cannot be read, or is another one than was pinned.
        UsageError: The model is not one of the network's.
    """
    reason = None
    for path in network.calibrations(network.model(header.digest)):
        calibration = Calibration.load(path)
        try:
            calibration.find_build(header)
            return calibration
        except CalibrationError as error:
            reason = error.with_traceback(None)
    if reason is None:
        return None
    raise CalibrationError(
        f"no pinned calibration of this proof; the last has: {reason.seen}",
        wanted=reason.wanted,
        do="measure this build with `assay poc calibrate`, and pin the file; or pass --calibration",
    )


def list_pinned(network: NetworkPins) -> list[str]:
    """Return what a file pins, one line a table."""
    shared = network.round.model_dump(exclude_none=True)
    lines = ["round: " + ", ".join(f"{name} {value}" for name, value in shared.items())]
    lines += [f"network: {network.network}"] if network.network else []
    keys = len({node.public_key for node in network.nodes})
    lines += [f"nodes: {keys} keys with {len(network.nodes)} shares"] if keys else []
    for model in network.models:
        lines.append(
            f"model: {model.reference}, {model.weights} weights, checkpoint {model.digest[:12]}"
        )
        for build in model.builds:
            lines.append(
                "build: "
                + _values(build, [name for name in BUILD_FIELDS if name not in build.free])
            )
        lines += [f"calibration: {pinned.file}" for pinned in model.calibrations]
    return lines


def list_open(network: NetworkPins) -> list[str]:
    """Return what a file leaves open and who says it instead, one line each."""
    agreed = network.round
    drawn = Round(
        block_hash="any", public_key="any", preset=agreed.preset, strength=agreed.strength
    )
    texts = {
        "block: --block-hash says it for each round": agreed.block_hash is None,
        "key: --public-key says it for each proof; [[nodes]] lists those that may prove": (
            not network.nodes
        ),
        "share: --node-id says it for each proof": not network.nodes and agreed.node_count > 1,
        f"nonces: any {agreed.fewest_nonces} or more that are consecutive in the share": (
            agreed.nonces is None
        ),
        "input seeds: with 32 bits a node finds colliding ones by hashing; strength = 256 ends "
        "that": drawn.strength == 32,
    }
    lines = [text for text, is_open in texts.items() if is_open]
    for model in network.models:
        lines += [
            f"build of {model.reference}: {_values(build, build.free)}"
            for build in model.builds
            if build.free
        ]
        if not model.calibrations:
            lines.append(
                f"honest noise of {model.reference}: no calibration, so no verdict but of a "
                f"bundled model"
            )
    return lines


def _values(build: Build, names: Sequence[str]) -> str:
    return ", ".join(
        f"{name} {' or '.join(map(str, getattr(build, name))) or 'none'}" for name in names
    )
