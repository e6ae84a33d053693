"""``assay poc pins``: write and read the file that says what a network agreed on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from assay.cli.flags import (
    ARGUMENT,
    DISTANCE,
    KEY,
    NAME,
    NONCES,
    NUMBER,
    OUTPUT,
    POSITIONS,
    BlockHash,
    ModelName,
    Overwrite,
    PublicKey,
)
from assay.cli.output import emit_json, show_values, table
from assay.cli.poc import poc
from assay.errors import CalibrationError, ProofMismatch, UsageError
from assay.settings import Flag, Settings

if TYPE_CHECKING:
    from assay.poc.protocol.builds import Build
    from assay.poc.protocol.pins_file import NetworkPins
    from assay.poc.protocol.record import Header

pins = poc.group_of("pins", "Write and check pins.toml.", panel="Validator")


class NewPinsSettings(Settings):
    """Settings of ``assay poc pins new``: what is known of a network before its first proof."""

    model: ModelName
    output: Annotated[Path, OUTPUT] = Field(description="Pins file to write.")
    from_proof: tuple[Path, ...] = Field((), description="Honest proof whose round and build are taken over.")
    calibration: tuple[Path, ...] = Field((), description="Calibration file of this model to pin.")
    public_key: Annotated[tuple[str, ...], KEY] = Field((), description="Key of a node that may prove; else any.")
    preset: Annotated[str | None, NAME] = Field(None, description="Preset; that of the proof, or poc-2.0.")
    seq_len: Annotated[int | None, POSITIONS] = Field(None, description="Positions; as in the proof, or 256.")
    strength: Literal[32, 256] = Field(256, description="Bits of the input seeds; those of 256 cannot collide.")
    node_count: Annotated[int, NUMBER] = Field(1, ge=1, description="Number of machines of one key.")
    overwrite: Overwrite = False
    r_target: Annotated[float | None, DISTANCE] = Field(None, description="As in the proof, or 1.416.")
    fewest_nonces: Annotated[int, NONCES] = Field(32, ge=1, description="Number of nonces of the smallest proof.")
    dtype: Annotated[str | None, Flag(unit="DTYPE")] = Field(
        None, description="Number format of the build where there is no proof; else the first one of the preset."
    )


class CheckPinsSettings(Settings):
    """Settings of ``assay poc pins check``: what is known of the round of a proof."""

    pins: Annotated[Path, ARGUMENT] = Field(description="Pins file.")
    proof: Annotated[Path | None, ARGUMENT] = Field(None, description="Proof file that is held against it.")
    block_hash: BlockHash = None
    public_key: PublicKey = None
    node_id: Annotated[int | None, NUMBER] = Field(None, description="Share of the node.")


@pins.add(
    "new",
    NewPinsSettings,
    shown="model output from_proof calibration public_key preset seq_len strength node_count overwrite",
    example="assay poc pins new --model reference:qwen3 --from-proof honest.jsonl -o pins.toml",
)
def new(chosen: NewPinsSettings, as_json: bool) -> None:
    """Write a pins file for a model.

    Seeds have 256 bits. What only a proof can say is left to be filled in.
    """
    from assay import poc
    from assay.files.storage import check_new_file, write_atomic
    from assay.models.load import identify, model_info
    from assay.poc.engines.hf.engine import check_shape
    from assay.poc.protocol.pins_file import UNFILLED, PinnedFile, pins_text

    check_new_file(chosen.output, overwrite=chosen.overwrite)
    headers = [poc.Proof.load(path).header for path in chosen.from_proof]
    asked = _round(chosen, headers)
    poc.Pins(prover_dtype=chosen.dtype)  # an error names the formats
    builds = _builds(chosen, headers, asked["preset"])
    if chosen.seq_len is not None:  # the default is one to be changed in the file
        steps = poc.get_pipeline(asked["preset"]).steps
        check_shape(model_info(chosen.model), batch_size=1, seq_len=chosen.seq_len, steps=steps)
    for path in chosen.calibration:
        _check_calibration(path, headers)
    digest = identify(chosen.model, dtype="float32").digest  # in which dtype it would run does not matter
    for path, header in zip(chosen.from_proof, headers, strict=True):
        if (header.digest, header.weights) != (digest, "trained"):
            raise ProofMismatch(
                f"{path}: a proof of {header.round.model:.80} ({header.weights}, {header.digest[:12]})",
                wanted=f"one of {chosen.model} (trained, {digest[:12]})",
                do="pass the proof of a node that ran this checkpoint",
            )
    files = [PinnedFile.of(path, chosen.output.parent) for path in chosen.calibration]
    shares = [(key, share) for key in chosen.public_key for share in range(asked["node_count"])]
    tables: list[tuple[str, dict[str, Any]]] = [("[round]", asked)]
    tables += [("[[nodes]]", {"public_key": key, "node_id": share}) for key, share in shares]
    tables += [("[[models]]", {"reference": chosen.model, "digest": digest})]
    tables += [("[[models.builds]]", build) for build in builds] + [
        ("[[models.calibrations]]", file.model_dump()) for file in files
    ]
    write_atomic(chosen.output, pins_text(tables))
    unfilled = [f"models[0].builds[0].{name}" for name, value in builds[0].items() if value == UNFILLED]
    if not unfilled:
        poc.NetworkPins.load(chosen.output)  # a file that this version writes is one that it reads
    values: dict[str, Any] = {"path": str(chosen.output), "model": chosen.model, "digest": digest}
    values |= {name: asked[name] for name in ("preset", "seq_len", "strength")}
    values |= {"builds": len(headers), "calibrations": len(files), "to_fill_in": ", ".join(unfilled) or "nothing"}
    show_values("assay.poc.pins.new/1", values, as_json)


@pins.add(
    "check",
    CheckPinsSettings,
    example="assay poc pins check pins.toml proof.jsonl --block-hash BLOCK --public-key KEY",
)
def check(chosen: CheckPinsSettings, as_json: bool) -> int:
    """Say what a file pins and what it leaves open.

    With a proof, it says whether its header is allowed. A proof of which something would be taken on the prover's word
    gives exit code 2, as with verify.
    """
    from assay import poc
    from assay.poc.verdict.calibration import find_pinned_calibration

    network = poc.NetworkPins.load(chosen.pins)
    for model in network.models:
        list(network.calibrations(model))  # an error says which one is another file
    values: dict[str, Any] = {"path": str(chosen.pins), "pinned": _pinned(network), "open": _open(network)}
    believed: tuple[str, ...] = ()
    if chosen.proof is not None:
        header = poc.Proof.load(chosen.proof).header
        known = chosen.model_dump(include={"block_hash", "public_key", "node_id"})
        if network.nodes:  # a key and a share that the file lists are not only the prover's word
            stated = {"public_key": header.round.public_key, "node_id": header.round.node_id}
            known |= {name: value for name, value in stated.items() if known[name] is None}
        held = network.for_round(model=header.digest, **known)
        held.check(header)
        measured = find_pinned_calibration(network, header)
        believed = held.unpinned(header)
        noise = "the stated default: no calibration is pinned for this model"
        if measured is not None:
            noise = measured.find_build(header).source
        values |= {"proof": str(chosen.proof), "unpinned": believed, "noise": noise}
    if as_json:
        emit_json("assay.poc.pins.check/1", values)
    else:
        shown = values | {name: "\n".join(values[name]) or "nothing" for name in ("pinned", "open")}
        if chosen.proof is not None:
            shown |= {"unpinned": ", ".join(believed) or "nothing: the header is allowed"}
        table(("", "value"), [(name.replace("unpinned", "on the prover's word"), v) for name, v in shown.items()])
    return 2 if believed else 0


def _round(chosen: NewPinsSettings, headers: "Sequence[Header]") -> dict[str, Any]:
    """Return the values of the round: those of the flags, else of the proofs, else the published ones."""
    from assay.poc.protocol.pins import Pins
    from assay.poc.protocol.pipelines import get_pipeline
    from assay.poc.protocol.round import Round

    asked: dict[str, Any] = {}
    for name in ("preset", "seq_len", "r_target"):
        stated = {getattr(header.round, name) for header in headers}
        given = getattr(chosen, name)
        if given is None and len(stated) > 1:
            raise UsageError(
                f"proofs with {name} {' and '.join(map(str, sorted(stated))):.80}",
                wanted="proofs of one kind of round",
                do=f"pass --{name.replace('_', '-')}",
            )
        asked[name] = given if given is not None else next(iter(stated), getattr(Round, name))
    asked |= {"strength": chosen.strength, "node_count": chosen.node_count, "fewest_nonces": chosen.fewest_nonces}
    asked["preset"] = get_pipeline(asked["preset"]).name
    if get_pipeline(asked["preset"]).output != "distance":
        del asked["r_target"]  # only a distance has a target
    Pins(**asked)  # an error says which value is out of range
    return asked


def _builds(chosen: NewPinsSettings, headers: "Sequence[Header]", preset: str) -> list[dict[str, Any]]:
    """Return the builds of the proofs, or one that is to be filled in."""
    from assay.poc.protocol.builds import Build, describe_build
    from assay.poc.protocol.pins_file import BUILD_FIELDS, UNFILLED
    from assay.poc.protocol.pipelines import get_pipeline

    if headers and chosen.dtype is not None:
        raise UsageError(
            f"--dtype {chosen.dtype} beside --from-proof",
            wanted="one of the two: the number format of a build is that of its proof",
            do="leave --dtype out",
        )
    for header in headers:
        Build.of(header.fingerprint)  # an error says what is no build
    agreed = [chosen.dtype] if chosen.dtype else [*get_pipeline(preset).number_formats, UNFILLED]
    empty = dict.fromkeys(BUILD_FIELDS, UNFILLED) | {"dtype": agreed[0]}
    return [describe_build(header.fingerprint) for header in headers] or [empty]


def _check_calibration(path: Path, headers: "Sequence[Header]") -> None:
    """Refuse a file that is no calibration, or one of none of the proofs."""
    from assay.poc.verdict.calibration import Calibration

    measured, reasons = Calibration.load(path), []
    for header in headers:
        try:
            measured.find_build(header)
        except CalibrationError as error:
            reasons.append(error)
    if headers and len(reasons) == len(headers):
        raise reasons[0]


def _pinned(network: "NetworkPins") -> list[str]:
    """Return what a file pins, one line a table."""
    from assay.poc.protocol.pins_file import BUILD_FIELDS

    shared = network.round.model_dump(exclude_none=True)
    lines = ["round: " + ", ".join(f"{name} {value}" for name, value in shared.items())]
    keys = len({node.public_key for node in network.nodes})
    lines += [f"nodes: {keys} keys with {len(network.nodes)} shares"] if keys else []
    for model in network.models:
        lines.append(f"model: {model.reference}, {model.weights} weights, checkpoint {model.digest[:12]}")
        for build in model.builds:
            lines.append(f"build: {_values(build, [name for name in BUILD_FIELDS if name not in build.free])}")
        lines += [f"calibration: {pinned.file}" for pinned in model.calibrations]
    return lines


def _open(network: "NetworkPins") -> list[str]:
    """Return what a file leaves open and who says it instead, one line each."""
    from assay.poc.protocol.round import Round

    asked, lines = network.round, []
    if asked.block_hash is None:
        lines.append("block: --block-hash says it for each round")
    if not network.nodes:
        lines.append("key: --public-key says it for each proof; [[nodes]] lists those that may prove")
    if not network.nodes and asked.node_count > 1:
        lines.append("share: --node-id says it for each proof")
    if asked.nonces is None:
        lines.append(f"nonces: any {asked.fewest_nonces} or more that are consecutive in the share")
    if Round(block_hash="any", public_key="any", preset=asked.preset, strength=asked.strength).strength == 32:
        lines.append("input seeds: with 32 bits a node finds colliding ones by hashing; strength = 256 ends that")
    for model in network.models:
        lines += [f"build of {model.reference}: {_values(build, build.free)}" for build in model.builds if build.free]
        if not model.calibrations:
            lines.append(f"honest noise of {model.reference}: the stated default, without a calibration")
    return lines


def _values(build: "Build", names: Sequence[str]) -> str:
    return ", ".join(f"{name} {' or '.join(map(str, getattr(build, name))) or 'none'}" for name in names)
