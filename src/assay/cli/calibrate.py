"""``assay poc calibrate``: the honest noise of a model, and the r_target of a valid rate."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import join
from typing import Annotated, Literal

import click
from pydantic import Field

import assay
from assay.cli.flags import ARGUMENT, CALIBRATION, OUTPUT, BlockNonces, Blocks
from assay.cli.poc import PresetName, poc
from assay.devices import Device
from assay.errors import UsageError
from assay.files.jsonl import dumps
from assay.files.storage import check_new_file
from assay.framework.groups import extension
from assay.framework.interruption import resumable
from assay.framework.output import (
    emit_json,
    in_column,
    progress_bar,
    say,
    show_values,
    table,
)
from assay.settings import Flag, Names, Settings


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
    pins: Path | None = Field(
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
    calibration: Annotated[Path | None, CALIBRATION] = Field(
        None, description="Calibration that --valid-rate or --export read."
    )
    export: Annotated[Literal["gonka"] | None, "CHAIN"] = Field(
        None, description="Chain whose parameters are chosen from --calibration: gonka."
    )
    checked: Annotated[int, "NONCES"] = Field(
        200, ge=1, le=2**20, description="Nonces of an audit on the chain, for --export."
    )
    alpha: Annotated[float, "SHARE"] = Field(
        0.001, gt=0, lt=1, description="False accusations of an audit that --export allows."
    )
    device: Device = None
    dimension: Annotated[int | None, "NUMBER"] = Field(
        None, ge=2, description="Dimension of the output."
    )
    blocks: Blocks = 16
    nonces: BlockNonces = 64
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
    "calibrate",
    CalibrateSettings,
    panel="Noise",
    shown="output model quick preset formats pins valid_rate calibration export device",
    rare="seq_len frame merge",
    example="assay poc calibrate --model reference:qwen3 --quick -o calibration.json",
)
def calibrate(chosen: CalibrateSettings, as_json: bool) -> None:
    """Measure honest noise, or give an r_target.

    With --model, the model runs on this machine in each number format, with other kernels and
    batches. The file has a law for every pair of formats, and --pins writes a pins file that names
    it. --quick measures float32 alone. tokens-1 reads the frame of the checkpoint; a missing one is
    measured first, and written beside. The time is estimated first. A stopped measurement continues
    when the command is repeated.

    Example: assay poc calibrate --model reference:qwen3 --quick --pins pins.toml -o law.json

    With honest proofs, two or more of every round, the file says how their machines differ, and
    from three machines on how often one that was not measured is accused. Proofs in the formats of
    `controls` are a validator's own, for a law of scores. --merge adds builds of other files.

    Example: assay poc calibrate mine.jsonl theirs.jsonl others.jsonl -o calibration.json

    With --valid-rate, it prints the r_target of a share of valid nonces.

    Example: assay poc calibrate --valid-rate 0.1

    With --export, it prints the parameters of a chain's count test, and what they cost nodes.

    Example: assay poc calibrate --export gonka --calibration calibration.json
    """
    if chosen.export is not None:
        _export_rule(chosen, as_json)
        return
    files = [
        path
        for source in chosen.proofs
        for path in (sorted(source.glob("*.jsonl")) if source.is_dir() else [source])
    ]
    chosen = chosen.model_copy(update={"proofs": tuple(files)})
    no_source = not chosen.proofs and chosen.vectors is None
    merging = bool(chosen.merge) and no_source and chosen.model is None
    _check_form(chosen, merging)
    if chosen.valid_rate is not None:
        _give_target(chosen, chosen.valid_rate, as_json)
        return
    if chosen.output is None:
        raise UsageError(
            "a measurement without -o", wanted="a file to write it to", do="add -o calibration.json"
        )
    if chosen.pins is not None:
        if chosen.pins.exists():
            raise UsageError(
                f"{chosen.pins} exists",
                wanted="a new file name",
                do=f"choose another name, or remove {chosen.pins} if nobody edited it",
                field="pins",
            )
        check_new_file(chosen.pins)
    proofs = _read_proofs(chosen.proofs)
    merged = [*map(assay.poc.Calibration.load, chosen.merge)]
    if merging:
        measured = merged.pop(0)
    elif chosen.model is not None and no_source:
        measured = _measure_model(chosen, chosen.model, chosen.output)
    elif chosen.vectors is not None:
        measured = extension("poc calibrate --vectors")(chosen)
    else:
        measured = _measure_proofs(chosen, proofs)
    for calibration in merged:
        measured = measured.merged(calibration)
    _write_law(chosen, measured, chosen.output, as_json)


def _read_proofs(paths: Sequence[Path]) -> "list[assay.poc.Proof]":
    """Return the proofs of files: every one once, and of one checkpoint."""
    from assay.poc.verdict.proof_calibration import check_one_checkpoint

    proofs = [*map(assay.poc.Proof.load, paths)]  # before torch is imported
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


def _give_target(chosen: CalibrateSettings, rate: float, as_json: bool) -> None:
    """Print the r_target of a share of valid nonces."""
    proofs = _read_proofs(chosen.proofs)
    from assay.poc.measurement import target_for

    options = chosen.model_dump(include={"dimension", "calibration", "model", "device"})
    values = target_for(rate, proofs, **options)
    if not as_json:
        # With three digits, the r_target of one nonce in ten would be that of one in thirty.
        values = {
            name: f"{value:.6g}" if isinstance(value, float) else value
            for name, value in values.items()
        }
    show_values("assay.poc.calibrate/1", values, as_json)


def _export_rule(chosen: CalibrateSettings, as_json: bool) -> None:
    """Print the parameters of a chain's rule, and what they and its defaults cost."""
    unused = chosen.model_fields_set - {"export", "calibration", "checked", "alpha"}
    chosen.refuse(sorted(unused), "--export", wanted="--calibration and nothing else")
    if chosen.calibration is None:
        raise UsageError(
            "--export with no --calibration",
            wanted="a calibration that was measured before",
            do="`assay poc calibrate --export gonka --calibration calibration.json`",
        )
    from assay.poc.verdict.chain_rule import export_rule

    exported = export_rule(
        assay.poc.Calibration.load(chosen.calibration), checked=chosen.checked, alpha=chosen.alpha
    ).as_dict()
    if as_json:
        emit_json("assay.poc.export/1", exported)
        return
    for cost in exported["costs"]:
        interval = f"{cost['low']:.2g} to {cost['high']:.2g}"
        rows = [
            ("honest accused", f"{cost['false_accusation']:.2g} ({interval})"),
            *((f"caught: {name}", f"{power:.1%}") for name, power in cost["power"].items()),
        ]
        table((cost["rule"], f"{cost['machines']}, {chosen.checked} nonces"), rows)
    click.echo(dumps(exported["stat_test"]))


def _frame_file(chosen: CalibrateSettings, preset: str, output: Path) -> Path | None:
    """Return the file of the frame that a measurement reads or writes; None where it needs none."""
    is_framed = assay.poc.get_pipeline(preset).framed
    return chosen.frame or (output.with_suffix(".frame.safetensors") if is_framed else None)


def _measure_model(chosen: CalibrateSettings, model: str, output: Path) -> "assay.poc.Calibration":
    """Measure a model on this machine; a stopped measurement is continued."""
    from assay.models.frame import Frame
    from assay.poc.launch import usual_preset
    from assay.poc.protocol.checks import check_positions
    from assay.poc.protocol.pins import check_extent
    from assay.poc.protocol.pipelines import check_frame_file

    preset = chosen.preset or usual_preset(model)
    pipeline = assay.poc.get_pipeline(preset)
    frame = _frame_file(chosen, preset, output)
    check_frame_file(pipeline, frame)
    if frame is not None and frame.exists():
        Frame.load(frame)
    check_extent(chosen.blocks, chosen.nonces, chosen.formats)
    if "seq_len" in chosen.model_fields_set:
        check_positions(model, None, seq_len=chosen.seq_len, steps=pipeline.steps)
    with progress_bar("measuring") as progress, resumable():
        return assay.poc.calibrate_model(
            model,
            preset=preset,
            quick=chosen.quick,
            device=chosen.device,
            frame=frame,
            partial=_partial_folder(output),
            progress=progress,
            announce=lambda text: say(f"measuring: {text}"),
            **chosen.model_dump(
                include={"seq_len", "blocks", "nonces", "formats"}, exclude_unset=True
            ),
        )


def _partial_folder(output: Path) -> Path:
    """Return the folder beside a calibration in which an unfinished measurement lies."""
    return output.with_name(f"{output.name}.part")


def _measure_proofs(
    chosen: CalibrateSettings, proofs: "Sequence[assay.poc.Proof]"
) -> "assay.poc.Calibration":
    """Measure the noise between the machines of proofs."""
    formats = dict.fromkeys(proof.header.fingerprint.dtype for proof in proofs)
    machines = [name for name in formats if name not in chosen.controls]
    if len(machines) > 1:
        say(
            f"warning: proofs in {' and '.join(machines)}: two number formats are two builds, and "
            f"one law over both is too wide for one of them; prove all with one --dtype"
        )
    info = None if chosen.model is None else assay.models.model_info(chosen.model)
    with progress_bar("leaving out", "machines") as progress:
        return assay.poc.calibrate(
            *proofs,
            hidden_size=None if info is None else info.hidden_size,
            controls=chosen.controls,
            progress=progress,
        )


def _write_law(
    chosen: CalibrateSettings, measured: "assay.poc.Calibration", output: Path, as_json: bool
) -> None:
    """Write a calibration, and the pins file where one is named; say what was measured."""
    from assay.poc.measurement import describe
    from assay.poc.one_machine import remove_measured

    measured.save(output)
    remove_measured(_partial_folder(output))
    for build in measured.builds:
        values = {"path": str(output), **describe(build)}
        if not as_json:
            values |= {
                name: in_column(text) for name, text in values.items() if isinstance(text, str)
            }
        show_values("assay.poc.calibrate/1", values, as_json, title="law")
    if chosen.pins is None or chosen.model is None:
        return
    from assay.poc.network_pins import write_pins

    first = measured.builds[0]
    written = write_pins(
        chosen.pins,
        chosen.model,
        round_values={
            "preset": first.preset,
            "seq_len": first.engines[0].seq_len,
            "r_target": None,
            "strength": 256,
            "node_count": 1,
            "fewest_nonces": 32,
        },
        engine=first.engines[0],
        calibrations=[output],
        frame=_frame_file(chosen, first.preset, output),
    )
    show_values("assay.poc.pins.new/1", written, as_json, title="pins")
    say(
        f"next: assay poc prove {join(['--pins', str(chosen.pins)])} --block-hash BLOCK "
        f"--public-key KEY -o proof.jsonl"
    )


def _check_form(chosen: CalibrateSettings, merging: bool) -> None:
    """Refuse what is no form of the command, before anything is read."""
    rate = chosen.valid_rate is not None
    measures = not rate and chosen.vectors is None and not merging
    alone = measures and not chosen.proofs and chosen.model is not None
    for applies, names, beside, reason in (
        (
            rate,
            ("vectors", "sets", "digest", "merge", "output"),
            "--valid-rate",
            "it measures no noise",
        ),
        (not rate, ("dimension", "calibration"), "no --valid-rate", "it belongs to --valid-rate"),
        (True, ("alpha", "checked"), "no --export", "it belongs to --export"),
        (not rate and not alone, ("device",), "no model that runs", "nothing is computed"),
        (
            not alone,
            ("pins", "preset", "frame", "seq_len", "quick", "blocks", "nonces", "formats"),
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
        or_model = ", or pass --model without proofs" if beside == "no --model alone" else ""
        if applies:
            chosen.refuse(names, beside, wanted=f"no {{flag}}: {reason}", otherwise=or_model)
    if merging and len(chosen.merge) < 2:
        raise UsageError(
            "one file to merge",
            wanted="two or more, or proofs to measure",
            do="repeat --merge with another file",
        )
    if measures and not alone and len(chosen.proofs) < 2:
        raise UsageError(
            f"no --model, and {'one proof' if chosen.proofs else 'no proofs'}",
            wanted="a model, or two honest proofs or more, or another form of the command",
            do="`assay poc calibrate --model M -o calibration.json`, or see `assay poc calibrate "
            "--help`",
        )
