"""``assay poc experiment``: the published tables measured again, resumable, with one report per run."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay.cli._commands import App, Resumable
from assay.cli._output import JsonFlag, emit_json, progress_bar, table
from assay.cli._settings import settings

if TYPE_CHECKING:
    from assay.reports import JsonObject
    from assay.research.approaches import ApproachPlan, WeightPlan, WeightRow
    from assay.research.matrix import Configuration, Plan
    from assay.research.redteam import RedteamPlan
    from assay.research.simulation import SimulationPlan

app = App(help="Measure the published tables again, each number with its noise.")

RunNameFlag = Annotated[str, typer.Option(help="Folder of the run; the same name continues it.")]
OutputFlag = Annotated[Path, typer.Option("-o", "--output", help="Directory that holds the folders of all runs.")]
EXPERIMENTS = Path("experiments")


@app.command(cls=Resumable, epilog="Example: assay poc experiment approaches --models reference:qwen3 --nonces 128")
@settings("assay.research.approaches:ApproachPlan")
def approaches(
    plan: "ApproachPlan",
    run_name: RunNameFlag = "approaches",
    output: OutputFlag = EXPERIMENTS,
    as_json: JsonFlag = False,
) -> None:
    """Measure every approach: distances against the chord law, spread of blocks, separability and cost."""
    from assay.research.approaches import run_approaches
    from assay.research.runs import read_run

    page = _measure(run_approaches, plan, run_name, output, "measuring", "approaches")
    cells = read_run(page.parent, "approaches").cells
    if as_json:
        _emit("approaches", page, approaches=cells)
        return
    columns = ("approach", "mean", "offset/SE", "spread", "noise band", "int4/honest", "AUC", "breaks it")
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
@settings("assay.research.approaches:WeightPlan")
def weights(
    plan: "WeightPlan", run_name: RunNameFlag = "weights", output: OutputFlag = EXPERIMENTS, as_json: JsonFlag = False
) -> None:
    """Compare trained weights with weights that are drawn per block: all of them, or the embeddings alone."""
    from dataclasses import asdict

    from assay.research.approaches import run_weights, weight_rows
    from assay.research.runs import read_run

    page = _measure(run_weights, plan, run_name, output, "measuring", "blocks")
    rows = weight_rows(read_run(page.parent, "weights").cells)
    if as_json:
        _emit("weights", page, rows=[asdict(row) for row in rows])
        return
    columns = ("weights", *rows[0].blocks, "spread of means", "noise band", "verdict")
    for model in dict.fromkeys(row.model for row in rows):
        table(columns, [_weights(row) for row in rows if row.model == model], title=model)
    typer.echo(f"report: {page}")


def _weights(row: "WeightRow") -> tuple[str, ...]:
    verdict = "inside noise" if row.inside else "beyond noise"
    means = (f"{mean:.4f}" for mean in row.means)
    return (row.weights, *means, f"{row.spread:.4f}", f"{row.low:.4f} to {row.high:.4f}", verdict)


@app.command(cls=Resumable, epilog="Example: assay poc experiment matrix --models reference:qwen3 --duration 10")
@settings("assay.research.matrix:Plan")
def matrix(
    plan: "Plan", run_name: RunNameFlag = "matrix", output: OutputFlag = EXPERIMENTS, as_json: JsonFlag = False
) -> None:
    """Test models × modes × blocks × keys against live services over HTTP, with a receiver of callbacks."""
    from functools import partial

    from assay.research.matrix import configurations, run_matrix
    from assay.research.runs import read_run

    run = partial(run_matrix, note=partial(typer.echo, err=True))
    page = _measure(run, plan, run_name, output, "testing", "tests")
    found = configurations(read_run(page.parent, "matrix").cells)
    if as_json:
        _emit("matrix", page, configurations=[row.as_dict() for row in found])
        return
    for one in found:
        keys = list(one.blocks[0].rates)
        rows = [
            (row.block, *(f"{row.rates[key]:.1%}" if key in row.rates else "" for key in keys), f"{row.rate:.1%}")
            for row in one.blocks
        ]
        table(("block", *keys, "mean"), rows, title=f"{one.model}, {one.mode}")
    columns = ("", "spread", "noise band", "verdict", "nonces/s", "undelivered")
    table(columns, [_configuration(row) for row in found], title="cross-block spread")
    typer.echo(f"report: {page}")


def _configuration(row: "Configuration") -> tuple[str, ...]:
    spread = (
        ("", "")
        if row.spread is None
        else (f"{row.spread.value:.1%}", f"{row.spread.low:.1%} to {row.spread.high:.1%}")
    )
    return f"{row.model}, {row.mode}", *spread, row.verdict, f"{row.nonces_per_second:.1f}", str(row.undelivered)


@app.command(cls=Resumable, epilog="Example: assay poc experiment redteam --models reference:qwen3 --searched 0")
@settings("assay.research.redteam:RedteamPlan")
def redteam(
    plan: "RedteamPlan", run_name: RunNameFlag = "redteam", output: OutputFlag = EXPERIMENTS, as_json: JsonFlag = False
) -> None:
    """Run every attacker against every preset: cost, error, residuals, and who catches it after how many nonces."""
    from assay.research import redteam as team
    from assay.research.runs import read_run

    page = _measure(team.run_redteam, plan, run_name, output, "attacking", "cells")
    cells = read_run(page.parent, "redteam").cells
    places = [(*field, preset) for field in team.fields(cells) for preset in team.PRESETS]
    best = [team.paying(cells, *place) for place in places]
    if as_json:
        _emit("redteam", page, paying=best)
        return
    for place in places:
        table(team.ATTACK_COLUMNS, team.attack_rows(cells, *place), title=", ".join(place))
    columns = ("model", "dtype", "preset", "attack that pays best", "cost", "ε", "over honest", "caught after")
    numbers = ("cost", "error", "over_honest")
    rows = [
        (*(b[k] for k in ("model", "dtype", "preset", "attack")), *(f"{b[k]:.2f}" for k in numbers), b["checked_99"])
        for b in best
    ]
    table(columns, [(*row[:-1], row[-1] or "never") for row in rows])
    typer.echo(f"report: {page}")


@app.command(cls=Resumable, epilog="Example: assay poc experiment simulate --presets hardened --nodes 2000")
@settings("assay.research.simulation:SimulationPlan")
def simulate(
    plan: "SimulationPlan",
    run_name: RunNameFlag = "simulate",
    output: OutputFlag = EXPERIMENTS,
    as_json: JsonFlag = False,
) -> None:
    """Simulate a network over a year under each verdict rule: false accusations, time to catch, junk that is paid."""
    from assay.research import simulation
    from assay.research.runs import read_run

    page = _measure(simulation.run_simulation, plan, run_name, output, "simulating", "presets")
    cells = read_run(page.parent, "simulate").cells
    if as_json:
        _emit("simulate", page, presets=list(cells))
        return
    for cell in cells:
        table(simulation.COLUMNS, simulation.table_rows(cell), title=f"{cell['preset']}, {cell['dtype']}")
    typer.echo(f"report: {page}")


@app.command(epilog="Example: assay poc experiment report --run-name approaches")
def report(run_name: RunNameFlag, output: OutputFlag = EXPERIMENTS, as_json: JsonFlag = False) -> None:
    """Write the page of a run from what its folder holds, also while the run continues."""
    from assay.research.runs import build_report, run_folder

    page = build_report(run_folder(output, run_name))
    if as_json:
        _emit("report", page)
    else:
        typer.echo(page)


def _measure(run: Callable[..., None], plan: Any, run_name: str, output: Path, label: str, unit: str) -> Path:
    """Measure what is missing in a run's folder; return the path of its page."""
    from assay.research.runs import build_report, run_folder

    folder = run_folder(output, run_name)
    with progress_bar(label, unit) as progress:
        run(plan, folder, progress=progress)
    return build_report(folder)


def _emit(command: str, page: Path, **found: object) -> None:
    emit_json(f"assay.poc.experiment.{command}/1", {"folder": str(page.parent), "report": str(page), **found})
