"""``assay poc experiment``: the published tables measured again, resumable, with one report per run."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay.cli.commands import App, Resumable
from assay.cli.output import JsonFlag, emit_json, progress_bar, table
from assay.cli.settings import settings

if TYPE_CHECKING:
    from assay_research.approaches.approaches import ApproachPlan, WeightPlan
    from assay_research.matrix.matrix import Plan
    from assay_research.redteam.run import RedteamPlan
    from assay_research.responses.run import ResponsesPlan
    from assay_research.simulation.network import SimulationPlan

    from assay.files.jsonl import JsonObject


app = App(help="Measure the published tables again, each number with its noise.")

RunNameFlag = Annotated[str, typer.Option(help="Folder of the run; the same name continues it.")]
OutputFlag = Annotated[Path, typer.Option("-o", "--output", help="Directory that holds the folders of all runs.")]
EXPERIMENTS = Path("experiments")


@app.command(cls=Resumable, epilog="Example: assay poc experiment approaches --models reference:qwen3 --nonces 128")
@settings("assay_research.approaches.approaches:ApproachPlan")
def approaches(
    plan: "ApproachPlan",
    run_name: RunNameFlag = "approaches",
    output: OutputFlag = EXPERIMENTS,
    as_json: JsonFlag = False,
) -> None:
    """Measure every approach: distances against the chord law, spread of blocks, separability and cost."""
    from assay_research.approaches.approaches import run_approaches
    from assay_research.runs.runs import read_run

    page = _measure(run_approaches, plan, run_name, output, "measuring", "approaches")
    cells = read_run(page.parent, "approaches").cells
    if as_json:
        _emit("approaches", page, approaches=cells)
        return
    columns = ("approach", "mean", "offset in SE", "spread", "noise band", "int4/honest", "AUC", "breaks structure")
    for model in dict.fromkeys(cell["model"] for cell in cells):
        chosen = [_approach(cell) for cell in cells if cell["model"] == model]
        table(columns, chosen, title=f"{model}: spread at {plan.valid_rate:.0%} valid")
    typer.echo(f"report: {page}")


def _approach(cell: "JsonObject") -> tuple[str, ...]:
    spread = cell["spreads"][0]
    return (
        cell["approach"],
        f"{cell['mean']:.4f}",
        f"{cell['mean_off_in_standard_errors']:.1f}",
        f"{spread['spread']:.1%}",
        "{:.1%} to {:.1%}".format(*spread["noise_band"]),
        f"{cell['separation']:.1f}",
        f"{cell['auc']:.3f}",
        cell["breaks_structure"],
    )


@app.command(cls=Resumable, epilog="Example: assay poc experiment weights --models reference:llama --nonces 256")
@settings("assay_research.approaches.approaches:WeightPlan")
def weights(
    plan: "WeightPlan", run_name: RunNameFlag = "weights", output: OutputFlag = EXPERIMENTS, as_json: JsonFlag = False
) -> None:
    """Compare trained weights with weights that are drawn per block: all of them, or the embeddings alone."""
    from dataclasses import asdict

    from assay_research.approaches.approaches import run_weights, weight_rows, weight_table
    from assay_research.runs.runs import read_run

    page = _measure(run_weights, plan, run_name, output, "measuring", "blocks")
    rows = weight_rows(read_run(page.parent, "weights").cells)
    if as_json:
        _emit("weights", page, rows=[asdict(row) for row in rows])
        return
    table(*weight_table(rows), title=f"largest minus smallest block mean, blocks {', '.join(plan.blocks)}")
    typer.echo(f"report: {page}")


@app.command(cls=Resumable, epilog="Example: assay poc experiment matrix --models reference:qwen3 --duration 10")
@settings("assay_research.matrix.matrix:Plan")
def matrix(
    plan: "Plan", run_name: RunNameFlag = "matrix", output: OutputFlag = EXPERIMENTS, as_json: JsonFlag = False
) -> None:
    """Test models × modes × blocks × keys against live services over HTTP, with a receiver of callbacks."""
    from functools import partial

    from assay_research.matrix.matrix import run_matrix
    from assay_research.matrix.table import configurations, rate_table, spread_table, throughput_table
    from assay_research.runs.runs import read_run

    run = partial(run_matrix, note=partial(typer.echo, err=True))
    page = _measure(run, plan, run_name, output, "testing", "tests")
    found = configurations(read_run(page.parent, "matrix").cells)
    if as_json:
        _emit("matrix", page, configurations=[row.as_dict() for row in found])
        return
    for one in found:
        table(*rate_table(one), title=f"{one.model}, {one.mode}: valid rates")
    table(*spread_table(found), title="largest minus smallest valid rate of the blocks")
    table(*throughput_table(found), title="throughput")
    typer.echo(f"report: {page}")


@app.command(cls=Resumable, epilog="Example: assay poc experiment redteam --models reference:qwen3 --searched 0")
@settings("assay_research.redteam.run:RedteamPlan")
def redteam(
    plan: "RedteamPlan", run_name: RunNameFlag = "redteam", output: OutputFlag = EXPERIMENTS, as_json: JsonFlag = False
) -> None:
    """Run every attacker against every preset: cost, error, residuals, and who catches it after how many nonces."""
    from assay_research.redteam import tables as team
    from assay_research.redteam.field import PRESETS
    from assay_research.redteam.run import run_redteam
    from assay_research.runs.runs import read_run

    page = _measure(run_redteam, plan, run_name, output, "attacking", "cells")
    cells = read_run(page.parent, "redteam").cells
    places = [(*field, preset) for field in team.fields(cells) for preset in PRESETS]
    if as_json:
        _emit("redteam", page, paying=[team.paying(cells, *place) for place in places])
        return
    for place in places:
        table(*team.attack_table(cells, *place), title=", ".join(place))
    table(*team.paying_table(cells), title="attacks that save a quarter of the work by skipping")
    typer.echo(f"report: {page}")


@app.command(cls=Resumable, epilog="Example: assay poc experiment responses --models reference:qwen3")
@settings("assay_research.responses.run:ResponsesPlan")
def responses(
    plan: "ResponsesPlan",
    run_name: RunNameFlag = "responses",
    output: OutputFlag = EXPERIMENTS,
    as_json: JsonFlag = False,
) -> None:
    """Serve responses by every cheat, and score them by margins, by sketches, and as the rivals do."""
    from assay_research.responses import tables as team
    from assay_research.responses.run import EXPERIMENT, run_responses
    from assay_research.responses.tables import caught_table, honest_table, standing_table
    from assay_research.runs.runs import read_run

    page = _measure(run_responses, plan, run_name, output, "serving", "cells")
    cells = read_run(page.parent, EXPERIMENT).cells
    if as_json:
        _emit("responses", page, cells=list(cells))
        return
    for place in team.places(cells):
        table(*caught_table(cells, place), title=", ".join(place))
    table(*honest_table(cells), title="honest provers")
    table(*standing_table(cells), title="int4 weights: tokens until 99 % are caught")
    typer.echo(f"report: {page}")


@app.command(cls=Resumable, epilog="Example: assay poc experiment simulate --presets hardened --nodes 2000")
@settings("assay_research.simulation.network:SimulationPlan")
def simulate(
    plan: "SimulationPlan",
    run_name: RunNameFlag = "simulate",
    output: OutputFlag = EXPERIMENTS,
    as_json: JsonFlag = False,
) -> None:
    """Simulate a network over a year under each verdict rule: false accusations, time to catch, junk that is paid."""
    from assay_research.runs.runs import read_run
    from assay_research.simulation.network import run_simulation
    from assay_research.simulation.page import cell_name, honest_table, year_table

    page = _measure(run_simulation, plan, run_name, output, "simulating", "presets")
    cells = read_run(page.parent, "simulate").cells
    if as_json:
        _emit("simulate", page, presets=list(cells))
        return
    table(*honest_table(cells), title="honest nodes convicted in their whole life")
    for cell in cells:
        table(*year_table(cell), title=cell_name(cell))
    typer.echo(f"report: {page}")


@app.command(epilog="Example: assay poc experiment report --run-name approaches")
def report(run_name: RunNameFlag, output: OutputFlag = EXPERIMENTS, as_json: JsonFlag = False) -> None:
    """Write the page of a run from what its folder holds, also while the run continues."""
    from assay_research.runs.report import build_report
    from assay_research.runs.runs import run_folder

    page = build_report(run_folder(output, run_name))
    if as_json:
        _emit("report", page)
    else:
        typer.echo(page)


def _measure(run: Callable[..., None], plan: Any, run_name: str, output: Path, label: str, unit: str) -> Path:
    """Measure what is missing in a run's folder; return the path of its page."""
    from assay_research.runs.report import build_report
    from assay_research.runs.runs import run_folder

    from assay.models.load import model_info
    from assay.poc.engines.hf.memory import check_shape

    folder = run_folder(output, run_name)
    if hasattr(plan, "seq_len") and not folder.exists():
        for model in plan.models:
            check_shape(model_info(model), batch_size=plan.batch_size, seq_len=plan.seq_len)
    with progress_bar(label, unit) as progress:
        run(plan, folder, progress=progress)
    return build_report(folder)


def _emit(command: str, page: Path, **found: object) -> None:
    emit_json(f"assay.poc.experiment.{command}/1", {"folder": str(page.parent), "report": str(page), **found})
