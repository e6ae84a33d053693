"""``assay poc``: prove, verify, calibrate, and the pins file that says what a network agreed on."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import join
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click
from pydantic import Field

from assay.cli.flags import (
    ARGUMENT,
    FILE,
    FOLDER,
    MODEL,
    OUTPUT,
    PINS,
    PROOF,
    AuditSettings,
    BlockHash,
    CalibrationFiles,
    EngineName,
    FrameToRead,
    KernelName,
    ModelName,
    NumberFormat,
    Overwrite,
    PinsFile,
    PublicKey,
)
from assay.cli.framework import Group, extension, resumable
from assay.cli.output import emit_document, emit_json, progress_bar, say_next, show_values, table
from assay.devices import Device
from assay.errors import UsageError
from assay.settings import Flag, Names, Settings, Spelling

if TYPE_CHECKING:
    from assay.poc.protocol.proof import Proof
    from assay.poc.verdict.calibration_file import Calibration
    from assay.poc.verdict.entries import Standing
    from assay.poc.verdict.proof_judge import ProofVerdict


# public key of rounds that are proved to be published, and the beginning of their block hashes
COLLECTED = "collect"

POSITIONS = 256  # of a nonce of the published rounds

poc = Group("poc", "Prove that a model ran, and check such proofs.", elsewhere=("experiment",))
CHEAT = "a tenth of the nonces at 5 times the honest noise"
COLUMN = 90  # characters of a reason in a line


def _positions(text: str) -> tuple[int, int]:
    first, _, end = text.partition(":") if ":" in text else ("0", "", text)
    if not (
        first.isascii() and first.isdigit() and end.isascii() and end.isdigit() and len(text) <= 40
    ):
        raise ValueError("a number N, or two A:B with A < B, for instance 0:256")
    return int(first), int(end)


FrameFile = Annotated[
    FrameToRead,
    Field(description="Frame of the checkpoint, for tokens-1; else that of the pins file."),
]
PresetName = Annotated[
    str | None,
    "NAME",
    Field(
        description="Preset; else tokens-1, or poc-2.0 of a model of assay or without tokenizer."
    ),
]
RANGE = Spelling(_positions, "{0[0]}:{0[1]}".format, "FIRST:END")


class ProveSettings(Settings):
    """Settings of ``assay poc prove``; those of the round have no default where a pins file says
    them.
    """

    model: Annotated[str | None, MODEL] = Field(
        None, description="Model: a directory, a hub id, or that of the pins."
    )
    block_hash: BlockHash = None
    public_key: PublicKey = None
    output: Annotated[Path, OUTPUT] = Field(description="Proof file to write.")
    pins: PinsFile = None
    nonces: Annotated[tuple[int, int], RANGE] = Field(
        (0, 256), description="Positions in this node's share."
    )
    batch_size: Annotated[int | Literal["auto"], "NONCES"] = Field(
        32, description="Nonces per forward pass, part of the fingerprint; auto fills the memory."
    )
    device: Device = None
    engine: EngineName = Field("hf", description="Engine that runs the model.")
    overwrite: Overwrite = False
    preset: PresetName = None
    seq_len: Annotated[int, "POSITIONS"] = Field(
        256, description="Input positions of a nonce; with decode, its prompt."
    )
    r_target: Annotated[float, "DISTANCE"] = Field(
        1.416, description="Distance below which a nonce is valid."
    )
    strength: Literal[32, 256] = Field(
        32, description="Bits of the seed of each input; 256 cannot collide."
    )
    node_id: Annotated[int, "NUMBER"] = Field(0, description="Share of this node, from 0.")
    node_count: Annotated[int, "NUMBER"] = Field(
        1, description="Number of nodes that share the nonces of the key."
    )
    block_height: Annotated[int, "NUMBER"] = Field(
        0, description="Height of the block, recorded in the proof."
    )
    dtype: NumberFormat = None
    kernels: KernelName = "auto"
    deterministic: bool = Field(
        False, description="Refuse operations that may give other bits the next time."
    )
    frame: FrameFile = None


class VerifySettings(AuditSettings):
    """Settings of ``assay poc verify``: what the validator knows, and how it recomputes."""

    proof: Annotated[Path, ARGUMENT, PROOF] = Field(description="Proof file.")
    sample: Annotated[int | None, "NONCES"] = Field(
        None, description="Nonces to recompute; else what the law needs."
    )
    seq_len: Annotated[int | None, "POSITIONS"] = Field(
        None, description="Positions of a nonce agreed on; else 256."
    )
    preset: Annotated[str | None, "NAME"] = Field(
        None, description="Preset agreed on; else poc-2.0."
    )
    strength: Literal[32, 256] | None = Field(
        None, description="Bits of the input seeds agreed on; else 32."
    )
    r_target: Annotated[float | None, "DISTANCE"] = Field(
        None, description="Target distance agreed on; else 1.416."
    )
    node_id: Annotated[int | None, "NUMBER"] = Field(None, description="Share of the node; else 0.")
    node_count: Annotated[int | None, "NUMBER"] = Field(
        None, description="Nodes that share the nonces; else 1."
    )
    nonces: Annotated[tuple[int, int] | None, RANGE] = Field(
        None, description="Positions that the proof must hold; else any 32 or more in a row."
    )
    frame: FrameFile = None
    control: bool = Field(
        False, description="Compute every nonce again in the formats that --calibration names."
    )


class FrameSettings(Settings):
    """Settings of ``assay poc frame``."""

    model: Annotated[str, ARGUMENT] = Field(
        description="Model: a directory, a hub id, or a name of models list."
    )
    output: Annotated[Path, OUTPUT] = Field(description="Frame file to write.")
    device: Device = None
    dtype: NumberFormat = None
    overwrite: Overwrite = False


class CollectSettings(Settings):
    """Settings of ``assay poc collect``."""

    model: ModelName
    output: Annotated[Path, FOLDER] = Field(description="Folder for the proofs, one of each block.")
    preset: Annotated[str, "NAME"] = Field("poc-2.0", description="Preset of the network.")
    seq_len: Annotated[int, "POSITIONS"] = Field(
        256, description="Positions of a nonce in the network."
    )
    blocks: Annotated[int, "NUMBER"] = Field(
        16, ge=1, description="Blocks that are proved, collect-1 and so on."
    )
    nonces: Annotated[int, "NUMBER"] = Field(256, ge=1, description="Nonces of each block.")
    batch_size: Annotated[int, "NONCES"] = Field(
        32, ge=1, description="Nonces per forward pass, as in production."
    )
    engine: EngineName = Field("hf", description="Engine that runs the model in production.")
    dtype: NumberFormat = None
    device: Device = None
    frame: FrameFile = None


class CalibrateSettings(Settings):
    """Settings of ``assay poc calibrate``."""

    proofs: Annotated[tuple[Path, ...], ARGUMENT] = Field(
        (), description="Honest proofs, or folders of `collect`."
    )
    output: Annotated[Path | None, OUTPUT] = Field(None, description="Calibration file to write.")
    model: Annotated[str | None, "MODEL"] = Field(
        None, description="Model to measure on this machine; with proofs, their model."
    )
    quick: bool = Field(
        False, description="Measure --model in minutes: 256 nonces of 16 positions in float32."
    )
    preset: PresetName = None
    seq_len: Annotated[int, "POSITIONS"] = Field(
        256, ge=1, description="Positions of a nonce of --model; 16 with --quick."
    )
    pins: Annotated[Path | None, FILE] = Field(
        None, description="Pins file to write beside the calibration of --model."
    )
    frame: Path | None = Field(
        None, description="Frame of --model, for tokens-1; a missing file is measured."
    )
    merge: tuple[Path, ...] = Field(
        (), description="Calibration file whose builds are added; repeatable."
    )
    valid_rate: Annotated[float | None, "SHARE"] = Field(
        None, gt=0, le=1, description="Wanted share of valid nonces."
    )
    calibration: Path | None = Field(
        None, description="Calibration that says how blocks differ, for --valid-rate."
    )
    device: Device = None
    dimension: Annotated[int | None, "NUMBER"] = Field(
        None, ge=2, description="Dimension of the output."
    )
    blocks: Annotated[int, "NUMBER"] = Field(
        16, ge=1, description="Blocks that --model is measured in."
    )
    nonces: Annotated[int, "NUMBER"] = Field(
        64, ge=1, description="Nonces of each of these blocks."
    )
    formats: Annotated[Names, Flag(("--formats", "--dtype"), unit="DTYPES")] = Field(
        ("bfloat16", "float16", "float32"),
        description="Number formats that --model is measured in; float32 with --quick.",
    )
    controls: Names = Field(
        (), description="Number formats of PROOFS that are computed again by those who validate."
    )
    vectors: Path | None = Field(
        None, description="Sets of vectors of a network, in place of proofs (research)."
    )
    sets: Names = Field(
        (), description="Words that the name of a set must have; with a dash before: must not."
    )
    digest: Annotated[str | None, "HASH"] = Field(
        None, pattern="^[0-9a-f]{64}$", description="SHA-256 of the checkpoint of --vectors."
    )


@poc.add(
    "prove",
    ProveSettings,
    panel="Node",
    shown="model block_hash public_key output pins preset seq_len nonces batch_size dtype frame "
    "engine device overwrite",
    example="assay poc prove --model reference:qwen3 --block-hash BLOCK --public-key KEY -o "
    "proof.jsonl",
    resumable=True,
)
def prove(chosen: ProveSettings, as_json: bool) -> None:
    """Prove a range of nonces.

    An interrupted run continues when the command is repeated. With --pins, what the network agreed
    on is taken from its file.
    """
    from assay import poc
    from assay.poc.launch import Proving, open_prover, usual_preset
    from assay.poc.network_pins import asked

    names = (
        "model",
        "engine",
        "dtype",
        "device",
        "batch_size",
        "kernels",
        "deterministic",
        "frame",
    )
    options = {name: getattr(chosen, name) for name in names} | {"model": chosen.model or ""}
    stated = {name: getattr(chosen, name) for name in chosen.model_fields_set - {"model"}}
    task = asked(
        chosen.pins,
        Proving(
            **options,
            preset=chosen.preset or usual_preset(options["model"]),
            seq_len=chosen.seq_len,
        ),
        stated,
        chosen.nonces if "nonces" in stated else None,
    )
    with open_prover(task.proving) as loaded, progress_bar("proving") as progress:
        task.check_engine(*loaded)
        if warning := task.missing_law(*loaded):
            click.echo(f"warning: {warning}", err=True)
        pace = _Pace(progress)
        to = chosen.model_dump(include={"output", "overwrite"})
        proof = poc.prove(
            loaded[0], task.round, task.nonces, engine=loaded[1], progress=pace.update, **to
        )
    resumed, first, rate = pace.summary()
    values = {
        "path": str(chosen.output),
        "model": proof.round.model,
        "preset": proof.round.preset,
        "records": proof.footer.records,
        "valid": proof.footer.valid,
        "valid_rate": round(proof.valid_rate, 4),
        "resumed": resumed,
        "seconds": proof.footer.seconds,
        "first_batch_seconds": round(first, 3),
        "nonces_per_second": round(rate, 2),
        "sha256": proof.footer.sha256,
    }
    if not as_json:
        pipeline = proof.header.pipeline
        empty = {"first_batch_seconds"}
        empty |= set() if pipeline.output == "distance" else {"valid", "valid_rate"}
        empty |= set() if resumed else {"resumed"}
        values = {name: value for name, value in values.items() if name not in empty}
    show_values("assay.poc.prove/1", values, as_json)
    if not as_json:
        say_next(_verifying(chosen, proof, task.proving.model))


def _verifying(chosen: ProveSettings, proof: "Proof", model: str) -> str:
    """Return the command that judges a proof which was just made, of the values of its command."""
    round = proof.round
    words = ["assay", "poc", "verify", str(chosen.output), "--model", model]
    words += ["--block-hash", round.block_hash, "--public-key", round.public_key]
    if chosen.pins is not None:
        words += ["--pins", str(chosen.pins)]
    else:
        if round.preset != "poc-2.0":
            words += ["--preset", round.preset]
        if round.seq_len != POSITIONS:
            words += ["--seq-len", str(round.seq_len)]
        if chosen.frame is not None:
            words += ["--frame", str(chosen.frame)]
    return join(words)


@poc.add(
    "verify",
    VerifySettings,
    panel="Validator",
    shown="model pins block_hash public_key preset seq_len nonces strength r_target node_id "
    "node_count "
    "prover_dtype sample calibration frame ledger dtype engine device",
    example="assay poc verify proof.jsonl --model reference:qwen3 --block-hash BLOCK --public-key "
    "KEY",
)
def verify(chosen: VerifySettings, as_json: bool) -> int:
    """Recompute a sample of a proof and judge it.

    Exit code 0 honest, 1 fraud, 2 undecided or bad input.

    The prover wrote the header of the proof. Exit code 0 needs the block and the key from you, and
    every other value that the prover could choose from you or at its published default. What is
    neither is shown, with exit code 2.

    With --ledger the audit is added to the ledger of nodes' lives, and the exit code is that of the
    whole life.
    """
    from assay.poc.audit import Auditor
    from assay.poc.protocol.pins import Pins

    names = {
        "block_hash",
        "public_key",
        "preset",
        "seq_len",
        "strength",
        "r_target",
        "node_id",
        "node_count",
    }
    stated = Pins(**chosen.model_dump(include=names | {"prover_dtype"}))
    with noting_new(chosen.ledger), progress_bar("verifying") as progress:
        auditor = Auditor(
            **auditor_values(chosen), frame=chosen.frame, control=chosen.control, progress=progress
        )
        outcome = auditor.audit_proof(chosen.proof, given=stated, positions=chosen.nonces)
    if as_json:
        emit_document(outcome.as_dict())
    else:
        _print_verdict(outcome.verdict, outcome.standing)
    return outcome.exit_code


@poc.add(
    "frame",
    FrameSettings,
    panel="Noise",
    example="assay poc frame reference:qwen3 -o frame.safetensors",
)
def frame(chosen: FrameSettings, as_json: bool) -> None:
    """Measure the frame of a checkpoint.

    A network does so once, for the preset tokens-1. The file says from which tokens nonces are
    drawn, and what centres and scales the states. Publish it, and pin it: assay poc pins new
    --frame frame.safetensors.
    """
    from assay import poc
    from assay.files.storage import check_new_file
    from assay.poc.launch import load

    check_new_file(chosen.output, overwrite=chosen.overwrite)
    model = load(chosen.model, chosen.dtype, chosen.device)
    with progress_bar("measuring", "sequences") as progress:
        measured = poc.measure_frame(model, progress=progress)
    measured.save(chosen.output)
    counts = {
        "coordinates": len(measured.mean),
        "tokens": measured.rows - len(measured.left_out),
        "left_out": len(measured.left_out),
    }
    values = {
        "path": str(chosen.output),
        "model": model.reference,
        "digest": measured.digest,
        "sha256": measured.sha256,
    }
    show_values("assay.poc.frame/1", values | counts, as_json)


@contextmanager
def noting_new(ledger: Path | None) -> Iterator[None]:
    """Say of a ledger that it was begun: a mistyped path would begin a life again."""
    is_new = ledger is not None and not ledger.exists()
    yield
    if is_new:
        click.echo(f"new ledger {ledger}", err=True)


def auditor_values(chosen: Settings) -> dict[str, Any]:
    """Return the values of settings that say how a validator recomputes."""
    names = (
        "model",
        "pins",
        "calibration",
        "engine",
        "dtype",
        "device",
        "sample",
        "seed",
        "alpha",
        "ledger",
    )
    return {name: getattr(chosen, name) for name in names}


class _Pace:
    """When batches were done: the first one, which may compile kernels, apart from the rest.

    Nonces that an interrupted run left count for nothing: this one did not spend time on them.
    """

    def __init__(self, show: "Callable[[int, int], None] | None") -> None:
        self._show = show
        self._marks = [
            (time.perf_counter(), 0)
        ]  # the call, where the proof begins, the first batch, the newest one

    def update(self, count: int, total: int) -> None:
        """Note where the proof begins, and then every batch: the first and the newest are kept."""
        self._marks[3:] = []
        self._marks.append((time.perf_counter(), count))
        if self._show:
            self._show(count, total)

    def summary(self) -> tuple[int, float, float]:
        """Return nonces that an interrupted run left, seconds until the first batch was done, and
        nonces per second.

        The rate is that after the first batch, or of it where there was no other.
        """
        (begin, _), *later = self._marks
        resumed = later[0][1] if later else 0
        if len(later) < 2:
            return resumed, 0.0, 0.0
        (start, before), (end, count) = later[1], later[-1]
        rate = (
            (count - before) / (end - start)
            if count > before
            else (count - resumed) / (start - begin)
        )
        return resumed, start - begin, rate


def _in_column(text: str) -> str:
    """Return a text in lines of a table, with every word of a command whole."""
    return fill(text, COLUMN, break_on_hyphens=False, break_long_words=False)


def _print_verdict(verdict: "ProofVerdict", standing: "Standing | None") -> None:
    noise = verdict.noise
    sequential = verdict.sequential
    count = verdict.count
    header = verdict.header
    claims = header.claims() | {
        "nonces": f"{header.count} in {len(header.nonces)} run(s) from {header.nonces[0][0]}"
    }
    believed = [
        f"{name} {claims[name]} (pin it with --{name.replace('_', '-')})"
        for name in verdict.unpinned
    ]
    counted = f"{count.mismatches} of {count.n} mismatches, p = {count.p_value:.3g}"
    rule = (
        f"{counted}; it decides nothing"
        if header.pipeline.texts == "published"
        else "none for this preset"
    )
    condition = (
        ", if the prover's word is taken: exit code 2" if verdict.honest and believed else ""
    )
    rows = [
        ("verdict", f"{verdict.verdict}{condition}"),
        ("why", _in_column(verdict.reason)),
        ("block hash", header.round.block_hash),
        ("public key", header.round.public_key),
        ("model", f"{header.round.model:.80} ({header.digest[:12]})"),
        ("number format", header.fingerprint.dtype),
        ("preset", f"{header.round.preset}, {header.round.seq_len} positions"),
        ("pinned", ", ".join(verdict.pins.given) or "nothing"),
        ("on the prover's word", "\n".join(believed) or "nothing"),
        (
            "checked",
            f"{verdict.checked} of {verdict.proved} nonces, {verdict.work:.0%} of the node's work",
        ),
        ("power", "none" if verdict.power is None else f"{verdict.power:.0%} for {CHEAT}"),
        ("honest noise", "not measured" if noise is None else f"{noise.size:.2g} ({noise.source})"),
        (
            "gross residuals",
            ""
            if sequential is None
            else f"{sequential.gross} above {sequential.gross_threshold:.2g}",
        ),
        ("published rule", _in_column(rule)),
        *life_rows(standing),
    ]
    click.echo(f"{_sentence(verdict)}{condition}")
    table(("", "result"), rows)


def _sentence(verdict: "ProofVerdict") -> str:
    """Return what a verdict comes to, for a reader who knows no statistics."""
    checked = f"of {verdict.proved} nonces {verdict.checked} were recomputed"
    meanings = {
        "honest": "they match within honest noise",
        "fraud": "they differ by more than honest noise explains",
        "faulty": "what is wrong lies at some places of the batch, as with a broken machine",
    }
    return (
        f"{verdict.verdict.capitalize()}: {checked}; "
        f"{meanings.get(verdict.verdict, 'that decides nothing yet')}"
    )


def life_rows(standing: "Standing | None") -> list[tuple[str, str]]:
    """Return what `verify` says of the whole life."""
    if standing is None:
        return []
    evidence = standing.evidence
    summary = (
        f"{evidence.verdict}, after {standing.audits} audit(s) with {evidence.n} nonces that count"
    )
    numbers = f"e-value e^{evidence.log_e_value:.1f}, at most e^{evidence.log_e_max:.1f}"
    cheap = "" if evidence.share is None else f"; up to {evidence.share:.0%} may be cheap"
    return [
        ("whole life", summary),
        ("", f"{numbers}; for honesty e^{evidence.log_evidence_honest:.1f}{cheap}"),
    ]


@poc.add(
    "collect",
    CollectSettings,
    panel="Noise",
    shown="model output preset seq_len blocks nonces batch_size engine dtype device",
    example="assay poc collect --model reference:qwen3 --preset hardened -o machine-1",
    resumable=True,
)
def collect(chosen: CollectSettings, as_json: bool) -> None:
    """Prove public blocks, for a calibration.

    All machines prove the same ones, and assay poc calibrate takes the folders of several machines.
    The proofs say which checkpoint ran on which engine. They hold no host name, no path, no prompt,
    and no key of yours.
    """
    from assay import poc
    from assay.files.storage import check_folder
    from assay.poc.launch import Proving, open_prover

    poc.Round(
        block_hash=COLLECTED, public_key=COLLECTED, preset=chosen.preset, seq_len=chosen.seq_len
    )
    if poc.get_pipeline(chosen.preset).steps:
        raise UsageError(
            f"preset {chosen.preset}, whose tokens part after the first that differs",
            wanted="one whose values are compared nonce by nonce",
            do="choose another preset",
        )
    proving = Proving(**chosen.model_dump(exclude={"output", "blocks", "nonces"}))
    check_folder(chosen.output)
    with open_prover(proving) as (model, engine), progress_bar("proving", "blocks") as progress:
        chosen.output.mkdir(parents=True, exist_ok=True)
        shape: dict[str, Any] = {
            "preset": chosen.preset,
            "seq_len": chosen.seq_len,
            "model": model.digest,
        }
        for number in range(1, chosen.blocks + 1):
            round = poc.Round(block_hash=f"{COLLECTED}-{number}", public_key=COLLECTED, **shape)
            path = chosen.output / f"{round.block_hash}.jsonl"
            if not path.exists():
                poc.prove(model, round, range(chosen.nonces), engine=engine, output=path)
            header = poc.Proof.load(path).header
            if (header.round, header.fingerprint, header.count) != (
                round,
                engine.fingerprint,
                chosen.nonces,
            ):
                raise UsageError(
                    f"{path}, of another round, engine or number of nonces",
                    wanted="a proof of this run",
                    do="name another folder with -o",
                )
            if progress:
                progress(number, chosen.blocks)
    values = {"path": str(chosen.output), "blocks": chosen.blocks, "nonces": chosen.nonces}
    show_values("assay.poc.collect/1", values | engine.fingerprint.as_dict(), as_json)


@poc.add(
    "calibrate",
    CalibrateSettings,
    panel="Noise",
    shown="output model quick preset seq_len formats pins frame merge valid_rate calibration "
    "device",
    example="assay poc calibrate --model reference:qwen3 --quick -o calibration.json",
)
def calibrate(chosen: CalibrateSettings, as_json: bool) -> None:
    """Measure honest noise, or give an r_target.

    The first use takes a model, and needs this machine alone. The model runs in each number format,
    with other kernels and batches, and the file for `verify --calibration` has a law for every pair
    of formats. --pins also writes a pins file that names it. tokens-1 reads the frame of the
    checkpoint, by default from calibration.frame.safetensors; a missing file is measured first and
    written. --quick measures float32 alone and marks the law. The time of the whole is estimated
    first. A stopped measurement continues when the command is repeated.

    Example: assay poc calibrate --model reference:qwen3 --quick --preset tokens-1
        -o calibration.json --pins pins.toml

    The second use takes honest proofs of one checkpoint and preset, two or more of every round,
    from several machines. Three machines and more also judge a machine that was not measured, and
    the file says how often honest machines that are left out of the measurement are accused. Proofs
    in the formats of `controls` are no machines: a validator computes them again on its own, for a
    second law, of scores. --merge adds the builds of other files.

    Example: assay poc calibrate mine.jsonl theirs.jsonl others.jsonl -o calibration.json

    The third use gives the r_target of a share of valid nonces. Distances of a block are all wider
    or narrower by one factor. How much blocks differ is only said by --model or --calibration, with
    or without proofs.

    Example: assay poc calibrate --valid-rate 0.1
    """
    from assay.poc.verdict.calibration_file import Calibration

    files = [
        path
        for source in chosen.proofs
        for path in (sorted(source.glob("*.jsonl")) if source.is_dir() else [source])
    ]
    chosen = chosen.model_copy(update={"proofs": tuple(files)})
    no_source = not chosen.proofs and chosen.vectors is None
    merging = bool(chosen.merge) and no_source and chosen.model is None
    _check_form(chosen, merging)
    proofs = _read_proofs(chosen.proofs)
    merged = [*map(Calibration.load, chosen.merge)]
    if chosen.valid_rate is not None:
        _give_target(chosen, proofs, as_json)
        return
    if merging:
        measured = merged.pop(0)
    elif chosen.model is not None and no_source:
        measured = _measure_model(chosen)
    elif chosen.vectors is not None:
        measured = extension("poc calibrate --vectors")(chosen)
    else:
        measured = _measure_proofs(chosen, proofs)
    for calibration in merged:
        measured = measured.merged(calibration)
    _write_law(chosen, measured, as_json)


def _read_proofs(paths: Sequence[Path]) -> "list[Proof]":
    """Return the proofs of files: every one once, and of one checkpoint."""
    from dataclasses import asdict

    from assay.files.jsonl import dumps
    from assay.poc.protocol.proof import Proof
    from assay.poc.verdict.proof_calibration import check_one_checkpoint

    proofs = [*map(Proof.load, paths)]  # before torch is imported
    texts = {
        dumps([proof.header.as_dict(), proof.footer and asdict(proof.footer)]) for proof in proofs
    }
    if len(texts) < len(proofs):
        raise UsageError(
            "a proof that is given twice",
            wanted="every proof once: a machine says nothing about its noise beside itself",
            do="leave one out of PROOFS, or pass that of another machine",
        )
    check_one_checkpoint(proofs)
    return proofs


def _give_target(chosen: CalibrateSettings, proofs: "Sequence[Proof]", as_json: bool) -> None:
    """Print the r_target of a share of valid nonces."""
    from assay.poc.verdict.calibration_file import Calibration

    if chosen.calibration is not None:
        Calibration.load(chosen.calibration)
    from assay.poc.measurement import target_for

    options = chosen.model_dump(include={"dimension", "calibration", "model", "device"})
    assert chosen.valid_rate is not None
    show_values("assay.poc.calibrate/1", target_for(chosen.valid_rate, proofs, **options), as_json)


def _frame_file(chosen: CalibrateSettings, preset: str) -> Path | None:
    """Return the file of the frame that a measurement reads or writes; None where it needs none."""
    from assay.poc.protocol.pipelines import get_pipeline

    assert chosen.output is not None
    if not get_pipeline(preset).framed:
        return chosen.frame
    return chosen.frame or chosen.output.with_suffix(".frame.safetensors")


def _measure_model(chosen: CalibrateSettings) -> "Calibration":
    """Measure a model on this machine; a stopped measurement is continued."""
    from assay.models.frame import Frame
    from assay.poc.launch import usual_preset
    from assay.poc.protocol.pins import check_extent
    from assay.poc.protocol.pipelines import check_frame_file, get_pipeline

    assert chosen.output is not None
    assert chosen.model is not None
    preset = chosen.preset or usual_preset(chosen.model)
    frame = _frame_file(chosen, preset)
    if not get_pipeline(preset).framed:
        check_frame_file(get_pipeline(preset), frame)
    elif frame is not None and frame.exists():
        Frame.load(frame)
    check_extent(chosen.blocks, chosen.nonces, chosen.formats)
    from assay.poc.one_machine import calibrate_model

    names = {"seq_len", "blocks", "nonces", "formats"} & chosen.model_fields_set
    options: dict[str, Any] = {name: getattr(chosen, name) for name in names}
    options |= {"preset": preset, "quick": chosen.quick, "device": chosen.device, "frame": frame}
    partial = _partial_folder(chosen.output)
    with progress_bar("measuring") as progress, resumable():
        return calibrate_model(
            chosen.model,
            partial=partial,
            progress=progress,
            announce=lambda text: click.echo(f"measuring: {text}", err=True),
            **options,
        )


def _partial_folder(output: Path) -> Path:
    """Return the folder beside a calibration in which an unfinished measurement lies."""
    return output.with_name(f"{output.name}.part")


def _measure_proofs(chosen: CalibrateSettings, proofs: "Sequence[Proof]") -> "Calibration":
    """Measure the noise between the machines of proofs."""
    from assay.poc.measurement import measure

    formats = list(dict.fromkeys(proof.header.fingerprint.dtype for proof in proofs))
    machines = [name for name in formats if name not in chosen.controls]
    if len(machines) > 1:
        click.echo(
            f"warning: proofs in {' and '.join(machines)}: two number formats are two builds, and "
            f"one law over both is too wide for one of them; prove all with one --dtype",
            err=True,
        )
    with progress_bar("leaving out", "machines") as progress:
        return measure(proofs, model=chosen.model, controls=chosen.controls, progress=progress)


def _write_law(chosen: CalibrateSettings, measured: "Calibration", as_json: bool) -> None:
    """Write a calibration, and the pins file where one is named; say what was measured."""
    from shutil import rmtree

    from assay.poc.measurement import describe

    assert chosen.output is not None
    measured.save(chosen.output)
    rmtree(_partial_folder(chosen.output), ignore_errors=True)
    for build in measured.builds:
        values = {"path": str(chosen.output), **describe(build)}
        if not as_json:
            values["limits"] = _in_column(build.limits)
        show_values("assay.poc.calibrate/1", values, as_json, title="law")
    if chosen.pins is None or chosen.model is None:
        return
    from assay.poc.network_pins import write_pins

    first = measured.builds[0]
    round_values: dict[str, Any] = {
        "preset": first.preset,
        "seq_len": first.engines[0].seq_len,
        "r_target": None,
        "strength": 256,
        "node_count": 1,
        "fewest_nonces": 32,
    }
    written = write_pins(
        chosen.pins,
        chosen.model,
        round_values=round_values,
        engine=first.engines[0],
        calibrations=[chosen.output],
        frame=_frame_file(chosen, first.preset),
    )
    show_values("assay.poc.pins.new/1", written, as_json, title="pins")
    say_next(
        f"assay poc prove {join(['--pins', str(chosen.pins)])} --block-hash BLOCK --public-key KEY "
        f"-o proof.jsonl"
    )


def _check_form(chosen: CalibrateSettings, merging: bool) -> None:
    """Refuse what is no form of the command, before anything is read."""
    rate = chosen.valid_rate is not None
    measures = chosen.vectors is None and not merging
    alone = measures and not rate and not chosen.proofs and chosen.model is not None
    stated = chosen.model_fields_set
    shape = ("blocks", "nonces", "formats")
    for applies, names, beside, reason in (
        (
            rate,
            ("vectors", "sets", "digest", "merge", "output"),
            "--valid-rate",
            "it measures no noise",
        ),
        (not rate, ("dimension", "calibration"), "no --valid-rate", "it belongs to --valid-rate"),
        (not rate and not alone, ("device",), "no model that runs", "nothing is computed"),
        (
            not alone,
            ("pins", "preset", "frame", "seq_len", "quick", *shape),
            "no --model alone",
            "nothing is run",
        ),
        (chosen.vectors is None, ("sets", "digest"), "no --vectors", "it belongs to --vectors"),
        (
            rate or not chosen.proofs,
            ("controls",),
            "no proofs to compare",
            "it says which of them are controls",
        ),
        (bool(chosen.proofs), ("vectors",), "proofs", "vectors stand in their place"),
        (chosen.vectors is not None, ("model",), "--vectors", "vectors have no block scale"),
    ):
        for flag in (chosen.spelling(name) for name in names if applies and name in stated):
            raise UsageError(
                f"{flag} with {beside}", wanted=f"no {flag}: {reason}", do=f"leave {flag} out"
            )
    if rate:
        return
    if merging and len(chosen.merge) < 2:
        raise UsageError(
            "one file to merge",
            wanted="two or more, or proofs to measure",
            do="repeat --merge with another file",
        )
    if measures and not alone and len(chosen.proofs) < 2:
        raise UsageError(
            f"neither --model, --valid-rate, --vectors nor --merge, and {len(chosen.proofs)} "
            f"proof(s)",
            wanted="a model or two honest proofs or more with -o, or another form of the command",
            do="`assay poc calibrate --model M -o calibration.json`, or see `assay poc calibrate "
            "--help`",
        )
    if chosen.output is None:
        raise UsageError(
            "a measurement without -o", wanted="a file to write it to", do="add -o calibration.json"
        )


pins = poc.group_of("pins", "Write and check pins.toml.", panel="Validator")


class NewPinsSettings(Settings):
    """Settings of ``assay poc pins new``: what is known of a network before its first proof."""

    model: ModelName
    output: Annotated[Path, OUTPUT] = Field(description="Pins file to write.")
    from_proof: Annotated[tuple[Path, ...], PROOF] = Field(
        (), description="Honest proof whose round and build are taken over."
    )
    calibration: CalibrationFiles = Field((), description="Calibration file of this model to pin.")
    public_key: Annotated[tuple[str, ...], "KEY"] = Field(
        (), description="Key of a node that may prove; else any."
    )
    preset: Annotated[str | None, "NAME"] = Field(
        None, description="Preset; that of the proof, or poc-2.0."
    )
    seq_len: Annotated[int | None, "POSITIONS"] = Field(
        None, description="Positions; as in the proof, or 256."
    )
    strength: Literal[32, 256] = Field(
        256, description="Bits of the input seeds; those of 256 cannot collide."
    )
    node_count: Annotated[int, "NUMBER"] = Field(
        1, ge=1, description="Number of machines of one key."
    )
    false_convictions: Annotated[str | None, "K/N"] = Field(
        None, description="Accepted ones over all nodes: 1/100000."
    )
    overwrite: Overwrite = False
    r_target: Annotated[float | None, "DISTANCE"] = Field(
        None, description="As in the proof, or 1.416."
    )
    fewest_nonces: Annotated[int, "NONCES"] = Field(
        32, ge=1, description="Number of nonces of the smallest proof."
    )
    frame: FrameToRead = Field(
        None, description="Frame of the model to pin, for tokens-1, the preset then."
    )
    dtype: Annotated[str | None, "DTYPE"] = Field(
        None,
        description="Number format of the build where there is no proof; else the first one of "
        "the preset.",
    )


class CheckPinsSettings(Settings):
    """Settings of ``assay poc pins check``: what is known of the round of a proof."""

    pins: Annotated[Path, ARGUMENT, PINS] = Field(description="Pins file.")
    proof: Annotated[Path | None, ARGUMENT, PROOF] = Field(
        None, description="Proof file that is held against it."
    )
    block_hash: BlockHash = None
    public_key: PublicKey = None
    node_id: Annotated[int | None, "NUMBER"] = Field(None, description="Share of the node.")


@pins.add(
    "new",
    NewPinsSettings,
    shown="model output from_proof calibration frame public_key preset seq_len false_convictions "
    "overwrite",
    example="assay poc pins new --model reference:qwen3 --from-proof honest.jsonl -o pins.toml",
)
def new(chosen: NewPinsSettings, as_json: bool) -> None:
    """Write a pins file for a model.

    Seeds have 256 bits. What only a proof can say is left to be filled in.
    """
    from assay.poc.network_pins import write_pins

    names = {"preset", "seq_len", "r_target", "strength", "node_count", "fewest_nonces"}
    values = write_pins(
        chosen.output,
        chosen.model,
        proofs=chosen.from_proof,
        calibrations=chosen.calibration,
        public_keys=chosen.public_key,
        round_values=chosen.model_dump(include=names),
        dtype=chosen.dtype,
        frame=chosen.frame,
        false_convictions=chosen.false_convictions,
    )
    show_values("assay.poc.pins.new/1", values, as_json)


@pins.add(
    "check",
    CheckPinsSettings,
    example="assay poc pins check pins.toml proof.jsonl --block-hash BLOCK --public-key KEY",
)
def check(chosen: CheckPinsSettings, as_json: bool) -> int:
    """Say what a file pins and what it leaves open.

    With a proof, it says whether its header is allowed. A proof of which something would be taken
    on the prover's word gives exit code 2, as with verify.
    """
    from assay import poc
    from assay.poc.network_pins import find_pinned_calibration, list_open, list_pinned
    from assay.poc.verdict.calibration_file import Calibration, account_alpha, describe_promise
    from assay.poc.verdict.honest_noise import missing_law

    expected = chosen.model_dump(include={"block_hash", "public_key", "node_id"})
    if chosen.proof is None and any(value is not None for value in expected.values()):
        raise UsageError(
            "a round without a proof", wanted="the proof of that round", do="pass PROOF after PINS"
        )
    network = poc.NetworkPins.load(chosen.pins)
    pinned = [
        Calibration.load(path) for model in network.models for path in network.calibrations(model)
    ]
    promise = describe_promise(network, account_alpha(network), pinned)
    values: dict[str, Any] = {
        "path": str(chosen.pins),
        "pinned": list_pinned(network),
        "open": list_open(network),
    }
    values["network"] = promise
    believed: tuple[str, ...] = ()
    if chosen.proof is not None:
        header = poc.Proof.load(chosen.proof).header
        if network.nodes:  # a key and a share that the file lists are not only the prover's word
            stated = {"public_key": header.round.public_key, "node_id": header.round.node_id}
            expected |= {name: value for name, value in stated.items() if expected[name] is None}
        agreed = network.for_round(model=header.digest, **expected)
        agreed.check(header)
        measured = find_pinned_calibration(network, header)
        believed = agreed.unpinned(header)
        missing = missing_law(network.model(header.digest).reference, header.digest, header.round)
        noise = missing if measured is None else measured.find_build(header).source
        values |= {"proof": str(chosen.proof), "unpinned": believed, "noise": noise}
    if as_json:
        emit_json("assay.poc.pins.check/1", values)
    else:
        shown = values | {name: "\n".join(values[name]) or "nothing" for name in ("pinned", "open")}
        shown["network"] = "\n".join(
            f"{name.replace('_', ' ')}: {value}" for name, value in promise.items()
        )
        if chosen.proof is not None:
            shown |= {"unpinned": ", ".join(believed) or "nothing: the header is allowed"}
        table(
            ("", "value"),
            [(name.replace("unpinned", "on the prover's word"), v) for name, v in shown.items()],
        )
    return 2 if believed else 0
