"""``assay research``: measurements on data of others, with one page per run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli._commands import App, Resumable
from assay.cli._experiment import EXPERIMENTS, OutputFlag
from assay.cli._output import JsonFlag, emit_json, progress_bar, table
from assay.cli._settings import settings

if TYPE_CHECKING:
    from assay.research.clusters import ClusterPlan

app = App(help="Measure on data that networks published.")


@app.command(cls=Resumable, epilog="Example: assay research clusters nonces.jsonl.gz")
@settings("assay.research.clusters:ClusterPlan")
def clusters(
    plan: "ClusterPlan",
    data: Annotated[Path, typer.Argument(help="Sets of nonce vectors: JSON Lines, or gzip of them.")],
    run_name: Annotated[
        str | None, typer.Option(help="Folder of the run; one of the data's name and digest by default.")
    ] = None,
    output: OutputFlag = EXPERIMENTS,
    as_json: JsonFlag = False,
) -> None:
    """Hold every rule against nonces of real clusters: honest machines left out, other builds, simulated cheats."""
    from assay.research import clusters as found
    from assay.research.runs import build_report, read_run, run_folder

    folder = run_folder(output, run_name or found.run_name_of(data))
    with progress_bar("measuring", "cells") as progress:
        found.run_clusters(plan, data, folder, progress=progress)
    page, run = build_report(folder), read_run(folder, "clusters")
    summary = found.summarise(run.cells)
    if as_json:
        values = {"folder": str(folder), "report": str(page), "settings": run.settings, **summary}
        emit_json("assay.research.clusters/1", values)
        return
    table(*found.model_table(summary), title="sets")
    table(*found.fault_table(summary), title="pairs with a fault of the place")
    table(*found.honest_table(summary), title="honest machines left out of the law")
    table(*found.cheat_table(summary, found.REAL), title="other builds passed off as this one")
    table(*found.cheat_table(summary, found.SIMULATED), title="simulated cheats at 1.4 times the honest median")
    typer.echo(f"report: {page}")
