"""``assay research``: measurements on data of others, with one page per run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli.commands import App, Resumable
from assay.cli.experiment import EXPERIMENTS, OutputFlag
from assay.cli.output import JsonFlag, emit_json, progress_bar, table
from assay.cli.settings import settings

if TYPE_CHECKING:
    from assay_research.clusters.clusters import ClusterPlan


app = App(help="Measure on data that networks published.")


@app.command(cls=Resumable, epilog="Example: assay research clusters nonces.jsonl.gz")
@settings("assay_research.clusters.clusters:ClusterPlan")
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
    from assay_research.clusters.clusters import REAL, SIMULATED, run_clusters, run_name_of
    from assay_research.clusters.page import cheat_table, fault_table, honest_table, model_table, summarise
    from assay_research.runs.report import build_report
    from assay_research.runs.runs import read_run, run_folder

    folder = run_folder(output, run_name or run_name_of(data))
    with progress_bar("measuring", "cells") as progress:
        run_clusters(plan, data, folder, progress=progress)
    page, run = build_report(folder), read_run(folder, "clusters")
    summary = summarise(run.cells)
    if as_json:
        values = {"folder": str(folder), "report": str(page), "settings": run.settings, **summary}
        emit_json("assay_research.clusters/1", values)
        return
    table(*model_table(summary), title="sets")
    table(*fault_table(summary), title="pairs with a fault of the place")
    table(*honest_table(summary), title="honest machines left out of the law")
    table(*cheat_table(summary, REAL), title="other builds passed off as this one")
    table(*cheat_table(summary, SIMULATED), title="simulated cheats at 1.4 times the honest median")
    typer.echo(f"report: {page}")
