"""``assay poc selftest``: which settings of an engine change what nonces give."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

import assay
from assay.cli.flags import CalibrationFile, FrameFile, LaunchSettings, Positions
from assay.cli.poc import PresetName, poc
from assay.errors import UsageError
from assay.files.reading import read_whole
from assay.framework.output import in_column, progress_bar, show_tables
from assay.settings import Flag

SAYS = {
    "same bits": "same bits",
    "within the law": "within honest noise",
    "beyond the law": "BEYOND honest noise",
    "no law": "changed; no law says whether it matters",
    "not run": "not run",
}
LONGEST_KEY = 2**16  # bytes of a key file
BLOCK = "selftest"  # block and key of a round that pays no node


class SelftestSettings(LaunchSettings):
    """Settings of ``assay poc selftest``."""

    url: Annotated[str | None, "URL"] = Field(
        None, description="Running server of the model to ask instead: http://HOST:PORT/api/v1/pow."
    )
    preset: PresetName = None
    seq_len: Positions = 64
    nonces: Annotated[int, "NUMBER"] = Field(
        64, ge=4, le=4096, description="Nonces that are compared."
    )
    batch_size: Annotated[int, "NONCES"] = Field(
        16, ge=2, le=4096, description="Nonces of the usual batch."
    )
    calibration: CalibrationFile = None
    frame: FrameFile = None
    api_key_file: Annotated[Path | None, Flag(variable="ASSAY_API_KEY_FILE")] = Field(
        None, description="File with the key for --url."
    )


@poc.add(
    "selftest",
    SelftestSettings,
    panel="Node",
    shown="model url preset seq_len nonces batch_size calibration frame engine dtype",
    example="assay poc selftest --model reference:qwen3 --preset artifact",
)
def selftest(chosen: SelftestSettings, as_json: bool) -> int:
    """Find settings that change what nonces give.

    The same nonces run again, elsewhere in the batch, beside other nonces, alone, in smaller
    batches, with other kernels and threads, and on vLLM with its prefix cache, chunked prefill and
    speculative decoding. The table compares the largest change with honest noise.

    Exit code 0: no setting changes a bit, or all changes are within honest noise. 1: a change is
    beyond it, and a validator in one setting accuses a node in the other. 2: no law, or bad input.
    """
    from assay.poc.launch import Launch, usual_preset

    preset = chosen.preset or usual_preset(chosen.model)
    round = assay.poc.Round(
        block_hash=BLOCK,
        public_key=BLOCK,
        model=chosen.model,
        preset=preset,
        seq_len=chosen.seq_len,
    )
    launch = Launch(**chosen.values_for(Launch))
    options: dict[str, Any] = chosen.model_dump(include={"nonces", "batch_size"})
    pipeline = assay.poc.get_pipeline(preset)
    _check_preset(pipeline, remote=chosen.url is not None)
    if chosen.url is None:
        launch.check_engine(pipeline)
    else:
        chosen.refuse(
            ("engine", "dtype", "device", "frame"),
            "--url",
            wanted="a server, which has its own",
            otherwise=", or --url to start an engine here",
        )
    calibration = (
        None if chosen.calibration is None else assay.poc.Calibration.load(chosen.calibration)
    )
    from assay.poc.selftest import run_remote_selftest, run_selftest

    if chosen.url is None:
        launch.read_frame(pipeline)
        launch.check_loadable()
        with progress_bar("testing", "engines") as progress:
            result = run_selftest(
                launch, round, calibration=calibration, progress=progress, **options
            )
    else:
        builds = () if calibration is None else calibration.builds
        laws = (build.noise_between("", None) for build in builds if build.preset == preset)
        result = run_remote_selftest(
            chosen.url, round, key=_read_key(chosen.api_key_file), noise=next(laws, None), **options
        )
    rows = [
        (
            row.setting,
            SAYS[row.outcome],
            f"{row.changed} of {row.nonces}",
            row.bits,
            f"{row.largest:.2g}",
            "" if row.multiple is None else f"{row.multiple:.2g}",
        )
        for row in result.comparisons
    ]
    columns = ("setting", "result", "nonces changed", "bits", "largest", "over honest noise")
    show_tables(
        "assay.poc.selftest/1",
        {"exit_code": result.exit_code, **result.as_dict()},
        as_json,
        (columns, rows, ""),
        *(
            ((row.setting, "why"), [("", in_column(row.reason))], "")
            for row in result.comparisons
            if row.reason
        ),
    )
    return result.exit_code


def _read_key(path: Path | None) -> str:
    """Return the first key of a file, as the services read it; empty without a file."""
    if path is None:
        return ""
    words = read_whole(path, LONGEST_KEY).decode("ascii", "replace").split()
    if not words or not words[0].isascii():
        raise UsageError(
            f"the key file {path} without a key",
            wanted="a key of the server on its first line",
            do="write one into it, or leave --api-key-file out",
        )
    return words[0]


def _check_preset(pipeline: "assay.poc.Pipeline", *, remote: bool) -> None:
    """Refuse a preset that decodes, and for a server one whose values its jobs do not return."""
    if pipeline.steps:
        raise UsageError(
            f"preset {pipeline.name}, whose tokens part after the first that differs",
            wanted="one whose values are compared nonce by nonce",
            do="choose another preset",
        )
    if remote and pipeline.output == "distance":
        raise UsageError(
            f"preset {pipeline.name} with --url",
            wanted="one that publishes vectors, which a job returns",
            do="pass --preset artifact or tokens-1",
        )
