"""Pins files: write a new one, and say what one pins and what it leaves open."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from assay.errors import CalibrationError, ProofMismatch, UsageError
from assay.files.storage import write_atomic
from assay.models.load import identify, model_info
from assay.poc.engines.hf.engine import check_shape
from assay.poc.protocol.builds import Build, describe_build
from assay.poc.protocol.pins import Pins
from assay.poc.protocol.pins_file import BUILD_FIELDS, UNFILLED, NetworkPins, PinnedFile, pins_text
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.protocol.proof import Proof
from assay.poc.protocol.record import Header
from assay.poc.protocol.round import Round
from assay.poc.verdict.calibration import Calibration


def write_pins(
    output: Path,
    model: str,
    *,
    proofs: Sequence[Path] = (),
    calibrations: Sequence[Path] = (),
    public_keys: Sequence[str] = (),
    preset: str | None = None,
    seq_len: int | None = None,
    r_target: float | None = None,
    strength: Literal[32, 256] = 256,
    node_count: int = 1,
    fewest_nonces: int = 32,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Write a pins file for a model. What only a proof can say is left to be filled in.

    Args:
        output: File to write.
        model: Model that the network runs; it is hashed and not run.
        proofs: Honest proofs whose round and builds are taken over.
        calibrations: Calibration files of this model to pin.
        public_keys: Keys of the nodes that may prove; any when empty.
        preset: Preset of the rounds; that of the proofs, or the published one, when None.
        seq_len: Number of positions of a nonce, likewise.
        r_target: Target distance, likewise.
        strength: Bits of the input seeds.
        node_count: Number of machines of one key.
        fewest_nonces: Number of nonces of the smallest proof.
        dtype: Number format of the build where there is no proof.

    Returns:
        What was written, by name, with the places that are to be filled in.

    Raises:
        UsageError: A value is out of range, or the proofs are of different rounds.
        ProofMismatch: A proof is of another checkpoint.
        CalibrationError: A calibration is of none of the proofs.
    """
    headers = [Proof.load(path).header for path in proofs]
    given = {"preset": preset, "seq_len": seq_len, "r_target": r_target, "strength": strength}
    asked = _round(given | {"node_count": node_count, "fewest_nonces": fewest_nonces}, headers)
    Pins(prover_dtype=dtype)  # an error names the formats
    builds = _builds(dtype, headers, asked["preset"])
    if seq_len is not None:  # the default is one to be changed in the file
        steps = get_pipeline(asked["preset"]).steps
        check_shape(model_info(model), batch_size=1, seq_len=seq_len, steps=steps)
    for path in calibrations:
        _check_calibration(path, headers)
    digest = identify(model, dtype="float32").digest  # in which dtype it would run does not matter
    for path, header in zip(proofs, headers, strict=True):
        if (header.digest, header.weights) != (digest, "trained"):
            raise ProofMismatch(
                f"{path}: a proof of {header.round.model:.80} ({header.weights}, {header.digest[:12]})",
                wanted=f"one of {model} (trained, {digest[:12]})",
                do="pass the proof of a node that ran this checkpoint",
            )
    tables: list[tuple[str, dict[str, Any]]] = [("[round]", asked)]
    shares = [(key, share) for key in public_keys for share in range(node_count)]
    tables += [("[[nodes]]", {"public_key": key, "node_id": share}) for key, share in shares]
    tables += [("[[models]]", {"reference": model, "digest": digest})]
    tables += [("[[models.builds]]", build) for build in builds]
    files = [PinnedFile.of(path, output.parent) for path in calibrations]
    tables += [("[[models.calibrations]]", file.model_dump()) for file in files]
    write_atomic(output, pins_text(tables))
    unfilled = [f"models[0].builds[0].{name}" for name, value in builds[0].items() if value == UNFILLED]
    if not unfilled:
        NetworkPins.load(output)  # a file that this version writes is one that it reads
    values: dict[str, Any] = {"path": str(output), "model": model, "digest": digest}
    values |= {name: asked[name] for name in ("preset", "seq_len", "strength")}
    return values | {
        "builds": len(headers),
        "calibrations": len(files),
        "to_fill_in": ", ".join(unfilled) or "nothing",
    }


def _round(given: Mapping[str, Any], headers: Sequence[Header]) -> dict[str, Any]:
    """Return the values of the round: those of the flags, else of the proofs, else the published ones."""
    asked: dict[str, Any] = {}
    for name in ("preset", "seq_len", "r_target"):
        stated = {getattr(header.round, name) for header in headers}
        if given[name] is None and len(stated) > 1:
            raise UsageError(
                f"proofs with {name} {' and '.join(map(str, sorted(stated))):.80}",
                wanted="proofs of one kind of round",
                do=f"pass --{name.replace('_', '-')}",
            )
        asked[name] = given[name] if given[name] is not None else next(iter(stated), getattr(Round, name))
    asked |= {name: given[name] for name in ("strength", "node_count", "fewest_nonces")}
    asked["preset"] = get_pipeline(asked["preset"]).name
    if get_pipeline(asked["preset"]).output != "distance":
        del asked["r_target"]  # only a distance has a target
    Pins(**asked)  # an error says which value is out of range
    return asked


def _builds(dtype: str | None, headers: Sequence[Header], preset: str) -> list[dict[str, Any]]:
    """Return the builds of the proofs, or one that is to be filled in."""
    if headers and dtype is not None:
        raise UsageError(
            f"--dtype {dtype} beside --from-proof",
            wanted="one of the two: the number format of a build is that of its proof",
            do="leave --dtype out",
        )
    for header in headers:
        Build.of(header.fingerprint)  # an error says what is no build
    agreed = [dtype] if dtype else [*get_pipeline(preset).number_formats, UNFILLED]
    empty = dict.fromkeys(BUILD_FIELDS, UNFILLED) | {"dtype": agreed[0]}
    return [describe_build(header.fingerprint) for header in headers] or [empty]


def _check_calibration(path: Path, headers: Sequence[Header]) -> None:
    """Refuse a file that is no calibration, or one of none of the proofs."""
    measured, reasons = Calibration.load(path), []
    for header in headers:
        try:
            measured.find_build(header)
        except CalibrationError as error:
            reasons.append(error)
    if headers and len(reasons) == len(headers):
        raise reasons[0]


def list_pinned(network: NetworkPins) -> list[str]:
    """Return what a file pins, one line a table."""
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


def list_open(network: NetworkPins) -> list[str]:
    """Return what a file leaves open and who says it instead, one line each."""
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


def _values(build: Build, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {' or '.join(map(str, getattr(build, name))) or 'none'}" for name in names)
