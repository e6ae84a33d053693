"""``assay poc``: prove and verify nonces, measure a frame, and prove public blocks."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import join
from typing import TYPE_CHECKING, Annotated, Literal

import click
from pydantic import Field

import assay
from assay.cli.flags import (
    ARGUMENT,
    FILE,
    MODEL,
    PROOF,
    AuditSettings,
    BlockNonces,
    Blocks,
    EngineSettings,
    FileSettings,
    FolderSettings,
    FrameFile,
    KernelName,
    LaunchSettings,
    ModelName,
    ModelSettings,
    PinsFile,
    Positions,
    RoundNames,
    RoundSettings,
)
from assay.errors import UsageError
from assay.files.storage import check_folder
from assay.framework.groups import Group
from assay.framework.output import (
    Lines,
    emit_document,
    in_column,
    progress_bar,
    say,
    show_values,
    table,
)
from assay.settings import Flag, Spelling

if TYPE_CHECKING:
    from assay.poc.verdict.entries import Standing


# public key of rounds that are proved to be published, and the beginning of their block hashes
COLLECTED = "collect"

POSITIONS = 256  # of a nonce of the published rounds
MOST_UNSTEADY = 3  # batches, of which those that begin a run say little about its rate

poc = Group("poc", "Prove that a model ran, and check such proofs.", elsewhere=("experiment",))
CHEAT = "a tenth of the nonces at 5 times the honest noise"


def _positions(text: str) -> tuple[int, int]:
    first, _, end = text.partition(":") if ":" in text else ("0", "", text)
    if not (
        first.isascii() and first.isdigit() and end.isascii() and end.isdigit() and len(text) <= 40
    ):
        raise ValueError("a number N, or two A:B with A < B, for instance 0:256")
    return int(first), int(end)


PresetName = Annotated[
    str | None,
    "NAME",
    Field(
        description="Preset; else tokens-1, or poc-2.0 of a model of assay or without tokenizer."
    ),
]
RANGE = Spelling(_positions, "{0[0]}:{0[1]}".format, "FIRST:END")


class ProveSettings(FileSettings, RoundNames, RoundSettings, EngineSettings):
    """Settings of ``assay poc prove``."""

    model: Annotated[str | None, MODEL] = Field(
        None, description="Model: a directory, a hub id, or that of the pins."
    )
    pins: PinsFile = None
    nonces: Annotated[tuple[int, int], RANGE] = Field(
        (0, 256), description="Positions in this node's share."
    )
    batch_size: Annotated[int | Literal["auto"], "NONCES"] = Field(
        32, description="Nonces per forward pass, part of the fingerprint; auto fills the memory."
    )
    commit: Annotated[Path | None, FILE] = Field(
        None, description="Commitment to all nonces and values to write."
    )
    preset: PresetName = None
    block_height: Annotated[int, "NUMBER"] = Field(
        0, description="Height of the block, recorded in the proof."
    )
    kernels: KernelName = "auto"
    deterministic: bool = Field(
        False, description="Refuse operations that may give other bits the next time."
    )


class VerifySettings(RoundSettings, AuditSettings):
    """Settings of ``assay poc verify``: what the validator knows, and how it recomputes."""

    proof: Annotated[Path, ARGUMENT, PROOF] = Field(description="Proof file.")
    sample: Annotated[int | None, "NONCES"] = Field(
        None, description="Nonces to recompute; else what the law needs."
    )
    nonces: Annotated[tuple[int, int] | None, RANGE] = Field(
        None, description="Positions that the proof must hold; else any 32 or more in a row."
    )
    commitment: Annotated[
        tuple[Path, ...], Flag(reads="assay.poc.protocol.commitments:Commitment.load")
    ] = Field(
        (), description="Commitment of the node to these nonces; repeatable, with earlier ones."
    )
    control: bool = Field(
        False, description="Compute every nonce again in the formats that --calibration names."
    )


class FrameSettings(FileSettings, ModelSettings):
    """Settings of ``assay poc frame``."""

    model: Annotated[ModelName, ARGUMENT]


class CollectSettings(FolderSettings, LaunchSettings):
    """Settings of ``assay poc collect``."""

    preset: Annotated[str, "NAME"] = Field("poc-2.0", description="Preset agreed on; else poc-2.0.")
    seq_len: Positions = POSITIONS
    blocks: Blocks = 16
    nonces: BlockNonces = 256
    batch_size: Annotated[int, "NONCES"] = Field(32, ge=1, description="Nonces per forward pass.")
    frame: FrameFile = None


@poc.add(
    "prove",
    ProveSettings,
    panel="Node",
    shown="model pins block_hash public_key output nonces batch_size dtype engine device",
    rare="preset seq_len frame commit overwrite",
    example="assay poc prove --model reference:qwen3 --block-hash BLOCK --public-key KEY -o "
    "proof.jsonl",
    resumable=True,
)
def prove(chosen: ProveSettings, as_json: bool) -> None:
    """Prove a range of nonces.

    An interrupted run continues when the command is repeated. With --pins, what the network agreed
    on is taken from its file.
    """
    from assay.poc.launch import Proving, open_prover, usual_preset
    from assay.poc.network_pins import asked
    from assay.poc.protocol.commitments import Commitment, check_spread

    usual = {
        "model": chosen.model or "",
        "preset": chosen.preset or usual_preset(chosen.model or ""),
        "seq_len": chosen.seq_len or POSITIONS,
    }
    stated = {name: getattr(chosen, name) for name in chosen.model_fields_set - {"model"}}
    proving = Proving(**chosen.values_for(Proving) | usual)
    task = asked(chosen.pins, proving, stated, stated.get("nonces"))
    if chosen.commit is not None:
        check_spread(task.round, task.nonces)
    with open_prover(task.proving) as loaded, progress_bar("proving") as progress:
        task.check_engine(*loaded)
        if warning := task.missing_law(*loaded):
            say(f"warning: {warning}")
        marks = [(time.perf_counter(), 0)]

        def update(count: int, total: int) -> None:
            marks.append((time.perf_counter(), count))
            progress(count, total)

        def commit(proof: "assay.poc.Proof") -> None:
            assert chosen.commit is not None
            Commitment.of(proof).save(chosen.commit)

        proof = assay.poc.prove(
            loaded[0],
            task.round,
            task.nonces,
            engine=loaded[1],
            progress=update,
            output=chosen.output,
            overwrite=chosen.overwrite,
            finish=commit if chosen.commit is not None else None,
        )
    resumed, first, rate = _pace(marks)
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
    if chosen.commit is not None:
        values["commitment"] = Commitment.of(proof).root
    counts = proof.header.pipeline.output == "distance"
    says = {
        "valid": counts,
        "valid_rate": counts,
        "resumed": resumed > 0,
        "first_batch_seconds": False,
    }
    shown = {name: value for name, value in values.items() if as_json or says.get(name, True)}
    show_values("assay.poc.prove/1", shown, as_json)
    if not as_json:
        say(f"next: {_verifying(chosen, proof, task.proving.model)}")


def _verifying(chosen: ProveSettings, proof: "assay.poc.Proof", model: str) -> str:
    """Return the command that judges a proof which was just made, of the values of its command."""
    round = proof.round
    words = ["assay", "poc", "verify", str(chosen.output), "--model", model]
    words += ["--block-hash", round.block_hash, "--public-key", round.public_key]
    usual = assay.poc.Round(block_hash="b", public_key="k", preset=round.preset)
    values = {"commitment": chosen.commit, "pins": chosen.pins, "node_id": round.node_id}
    if chosen.pins is None:
        words += ["--preset", round.preset] if round.preset != "poc-2.0" else []
        agreed = ("seq_len", "strength", "r_target", "node_count")
        values |= {name: getattr(round, name) for name in agreed} | {"frame": chosen.frame}
    for name, value in values.items():
        if value is not None and value != getattr(usual, name, None):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return join(words)


@poc.add(
    "verify",
    VerifySettings,
    panel="Validator",
    shown="model pins block_hash public_key sample calibration commitment ledger dtype device",
    rare="preset seq_len nonces strength r_target node_id node_count prover_dtype frame engine",
    example="assay poc verify proof.jsonl --model reference:qwen3 --block-hash BLOCK --public-key "
    "KEY",
)
def verify(chosen: VerifySettings, as_json: bool) -> int:
    """Recompute a sample of a proof and judge it.

    Exit code 0 honest, 1 fraud, 2 undecided or bad input. A proof that breaks its --commitment is
    fraud, and nothing is recomputed.

    The prover wrote the header. Exit code 0 needs the block and the key from you, and all else that
    the prover could choose from you or at its default; the rest is shown, with exit code 2.

    With --ledger the audit is added to a life, and the exit code is that of the life.
    """
    from assay.poc.audit import Auditor

    stated = chosen.values_for(assay.poc.Pins) | {"model": None, "nonces": None}
    with noting_new(chosen.ledger), progress_bar("verifying") as progress:
        outcome = Auditor(
            **chosen.values_for(Auditor), commitments=chosen.commitment, progress=progress
        ).audit_proof(chosen.proof, given=assay.poc.Pins(**stated), positions=chosen.nonces)
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
    model = assay.models.load_model(chosen.model, dtype=chosen.dtype, device=chosen.device)
    with progress_bar("measuring", "sequences") as progress:
        measured = assay.poc.measure_frame(model, progress=progress)
    measured.save(chosen.output)
    show_values(
        "assay.poc.frame/1",
        {
            "path": str(chosen.output),
            "model": model.reference,
            "digest": measured.digest,
            "sha256": measured.sha256,
            "coordinates": len(measured.mean),
            "tokens": measured.rows - len(measured.left_out),
            "left_out": len(measured.left_out),
        },
        as_json,
    )


@contextmanager
def noting_new(ledger: Path | None) -> Iterator[None]:
    """Say of a ledger that it was begun: a mistyped path would begin a life again."""
    is_new = ledger is not None and not ledger.exists()
    yield
    if is_new:
        say(f"new ledger {ledger}")


def _pace(marks: Sequence[tuple[float, int]]) -> tuple[int, float, float]:
    """Return nonces that an interrupted run left, seconds until the first batch was done, and
    nonces per second.

    The rate is that after the second batch: the first may compile kernels, and the second runs
    beside it. Of three batches and fewer it is that of the whole call. Nonces that an interrupted
    run left count for nothing: this one did not spend time on them.

    Args:
        marks: Time and number of nonces at the call, where the proof begins, and after every batch.
    """
    (begin, _), *later = marks
    resumed = later[0][1] if later else 0
    if len(later) < 2:
        return resumed, 0.0, 0.0
    is_steady = len(later) > MOST_UNSTEADY + 1
    start, before = later[2] if is_steady else (begin, resumed)
    end, count = later[-1]
    return resumed, later[1][0] - begin, (count - before) / (end - start)


def _print_verdict(verdict: "assay.poc.ProofVerdict", standing: "Standing | None") -> None:
    noise = verdict.noise
    count = verdict.count
    header = verdict.header
    claims = header.claims() | {
        "nonces": f"{header.count} in {len(header.nonces)} run(s) from {header.nonces[0][0]}"
    }
    believed = [
        f"{name} {claims[name]} (pin it with --{name.replace('_', '-')})"
        for name in verdict.unpinned
    ]
    rule = (
        f"{count.mismatches} of {count.n} mismatches, p = {count.p_value:.3g}; it decides nothing"
        if header.pipeline.texts == "published"
        else "none for this preset"
    )
    gross = (
        f"{verdict.sequential.gross} above {verdict.sequential.gross_threshold:.2g}"
        if verdict.sequential
        else ""
    )
    condition = (
        ", if the prover's word is taken: exit code 2" if verdict.honest and believed else ""
    )
    rows = [
        ("verdict", f"{verdict.verdict}{condition}"),
        ("why", in_column(verdict.reason)),
        ("block hash", header.round.block_hash),
        ("public key", header.round.public_key),
        ("model", f"{header.round.model:.80} ({header.digest[:12]})"),
        ("number format", header.fingerprint.dtype),
        ("preset", f"{header.round.preset}, {header.round.seq_len} positions"),
        ("pinned", in_column(", ".join(verdict.pins.given) or "nothing")),
        ("on the prover's word", Lines("\n".join(believed) or "nothing")),
        (
            "checked",
            f"{verdict.checked} of {verdict.proved} nonces, {verdict.work:.0%} of the node's work",
        ),
        ("power", "none" if verdict.power is None else f"{verdict.power:.0%} for {CHEAT}"),
        ("honest noise", "not measured" if noise is None else f"{noise.size:.2g} ({noise.source})"),
        ("gross residuals", gross),
        ("published rule", in_column(rule)),
        *life_rows(standing),
    ]
    click.echo(f"{_sentence(verdict)}{condition}")
    table(("", "result"), rows)


def _sentence(verdict: "assay.poc.ProofVerdict") -> str:
    """Return what a verdict comes to, for a reader who knows no statistics."""
    checked = f"of {verdict.proved} nonces {verdict.checked} were recomputed"
    meanings = {
        "honest": "they match within honest noise",
        "fraud": "they differ by more than honest noise explains",
        "faulty": "what is wrong lies at some places of the batch, as with a broken machine",
    }
    if verdict.fraud and not verdict.checked:
        return "Fraud: the proof is not what the node committed to; nothing was recomputed"
    return (
        f"{verdict.verdict.capitalize()}: {checked}; "
        f"{meanings.get(verdict.verdict, 'that decides nothing yet')}"
    )


def life_rows(standing: "Standing | None") -> list[tuple[str, str]]:
    """Return what `verify` says of the whole life."""
    from assay.poc.verdict.pool_faults import STRIKES

    if standing is None:
        return []
    evidence = standing.evidence
    cheap = "" if evidence.share is None else f"; up to {evidence.share:.0%} may be cheap"
    rows = [
        (
            "whole life",
            f"{standing.verdict}, after {standing.audits} audit(s) with {evidence.n} nonces that "
            "count",
        ),
        (
            "",
            f"e-value e^{evidence.log_e_value:.1f}, at most e^{evidence.log_e_max:.1f}; for "
            f"honesty e^{evidence.log_evidence_honest:.1f}{cheap}",
        ),
    ]
    if evidence.credited is not None:
        fault = (
            f"{standing.fault or 'none now'}; {evidence.credited} nonces credited, "
            f"{evidence.strikes} of {STRIKES} strikes"
        )
        rows.append(("fault", fault))
    return rows


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
    The proofs say which checkpoint ran on which engine. They hold no host, path, prompt or key.
    """
    from assay.poc.launch import Proving, open_prover

    assay.poc.Round(
        block_hash=COLLECTED, public_key=COLLECTED, preset=chosen.preset, seq_len=chosen.seq_len
    )
    if assay.poc.get_pipeline(chosen.preset).steps:
        raise UsageError(
            f"preset {chosen.preset}, whose tokens part after the first that differs",
            wanted="one whose values are compared nonce by nonce",
            do="choose another preset",
        )
    proving = Proving(**chosen.model_dump(exclude={"output", "blocks", "nonces"}))
    check_folder(chosen.output)
    with open_prover(proving) as (model, engine), progress_bar("proving", "blocks") as progress:
        chosen.output.mkdir(parents=True, exist_ok=True)
        for number in range(1, chosen.blocks + 1):
            round = assay.poc.Round(
                block_hash=f"{COLLECTED}-{number}",
                public_key=COLLECTED,
                preset=chosen.preset,
                seq_len=chosen.seq_len,
                model=model.digest,
            )
            path = chosen.output / f"{round.block_hash}.jsonl"
            if not path.exists():
                assay.poc.prove(model, round, range(chosen.nonces), engine=engine, output=path)
            header = assay.poc.Proof.load(path).header
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
            progress(number, chosen.blocks)
    values = {"path": str(chosen.output), "blocks": chosen.blocks, "nonces": chosen.nonces}
    show_values("assay.poc.collect/1", values | engine.fingerprint.as_dict(), as_json)


# Help lists groups and commands in the order in which they are added.
pins = poc.group_of("pins", "Write and check pins.toml.", panel="Validator")
