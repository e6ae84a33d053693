"""``assay vhack train``: one run of one arm, resumable."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli._output import JsonFlag, emit_json, table
from assay.cli._settings import settings

if TYPE_CHECKING:
    from assay.vhack.training import TrainSettings

_SHOWN = ("hack", "solve", "reward", "cin_s", "cin_t", "cin", "cout", "leak", "displacement", "seconds")


@settings("assay.vhack.training:TrainSettings")
def train(
    chosen: "TrainSettings",
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of the run; the same one continues it.")],
    tracker: Annotated[list[str] | None, typer.Option(help="A tracker of TRL's, such as wandb; repeatable.")] = None,
    allow_unsandboxed: Annotated[
        bool, typer.Option("--allow-unsandboxed", help="Run the programs even where nothing can isolate them.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train one arm by reinforcement with TRL. The same command goes on after the last checkpoint."""
    from assay.vhack import training

    result = training.train(
        chosen,
        output,
        console=lambda line: typer.echo(line, err=True),
        trackers=tuple(tracker or ()),
        allow_unsandboxed=allow_unsandboxed,
    )
    if as_json:
        values = {"path": str(result.folder), "arm": result.arm, "steps": result.steps}
        emit_json("assay.vhack.train.result/1", {**values, "resumed_from": result.resumed_from, "last": result.last})
        return
    rows = [(name.replace("_", " "), f"{result.last[name]:.4f}") for name in _SHOWN if name in result.last]
    table(("", "mean of the last 10 steps"), rows, title=f"{result.arm}: {result.steps} steps in {result.folder}")
