"""``assay poc experiment``: the published tables measured again, resumable, with one report per run."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
from pydantic import Field, create_model

from assay.cli.flags import OUTPUT
from assay.cli.framework import Group
from assay.cli.output import emit_json, progress_bar, table
from assay.settings import Flag, Settings

if TYPE_CHECKING:
    from assay.files.jsonl import JsonObject
    from assay_research.approaches.approaches import ApproachPlan, WeightPlan
    from assay_research.matrix.matrix import Plan
    from assay_research.redteam.run import RedteamPlan
    from assay_research.responses.run import ResponsesPlan
    from assay_research.simulation.network import Network, SimulationPlan

experiment = Group("poc experiment", "Measure the published tables again.")


class RunSettings(Settings):
    """Folder of a run."""

    run_name: Annotated[str, Flag(unit="NAME")] = Field(description="Folder of the run; the same name continues it.")
    output: Annotated[Path, OUTPUT] = Field(
        Path("experiments"), description="Directory that holds the folders of all runs."
    )


def measurement(name: str, plan: str, example: str) -> Any:
    """Return the decorator of a command that measures by a plan, in a folder that has its name by default."""
    description = RunSettings.model_fields["run_name"].description
    field: Any = (Annotated[str, Flag(unit="NAME")], Field(name, description=description))
    kind = create_model(f"{name.title()}Settings", __base__=RunSettings, run_name=field)
    plans = (plan, f"{plan.partition(':')[0]}:Network") if name == "simulate" else (plan,)
    line = f"assay poc experiment {name} {example}"
    return experiment.add(name, kind, *plans, panel="Research", example=line, resumable=True)


@measurement("approaches", "assay_research.approaches.approaches:ApproachPlan", "--models reference:qwen3 --nonces 128")
def approaches(run: RunSettings, plan: "ApproachPlan", as_json: bool) -> None:
    """Measure every approach and its cost.

    Distances are held against the chord law, with the spread of blocks and separability.
    """
    from assay_research.approaches.approaches import run_approaches
    from assay_research.runs.runs import read_run

    page = _measure(run_approaches, plan, run.run_name, run.output, "measuring", "approaches")
    cells = read_run(page.parent, "approaches").cells
    if as_json:
        _emit("approaches", page, approaches=cells)
        return
    columns = ("approach", "mean", "offset in SE", "spread", "noise band", "int4/honest", "AUC", "breaks structure")
    for model in dict.fromkeys(cell["model"] for cell in cells):
        chosen = [_approach(cell) for cell in cells if cell["model"] == model]
        table(columns, chosen, title=f"{model}: spread at {plan.valid_rate:.0%} valid")
    click.echo(f"report: {page}")


@measurement("weights", "assay_research.approaches.approaches:WeightPlan", "--models reference:llama --nonces 256")
def weights(run: RunSettings, plan: "WeightPlan", as_json: bool) -> None:
    """Compare trained weights with drawn ones.

    Weights are drawn per block: all of them, or the embeddings alone.
    """
    from dataclasses import asdict

    from assay_research.approaches.approaches import run_weights, weight_rows, weight_table
    from assay_research.runs.runs import read_run

    page = _measure(run_weights, plan, run.run_name, run.output, "measuring", "blocks")
    rows = weight_rows(read_run(page.parent, "weights").cells)
    if as_json:
        _emit("weights", page, rows=[asdict(row) for row in rows])
        return
    table(*weight_table(rows), title=f"largest minus smallest block mean, blocks {', '.join(plan.blocks)}")
    click.echo(f"report: {page}")


@measurement("matrix", "assay_research.matrix.matrix:Plan", "--models reference:qwen3 --duration 10")
def matrix(run: RunSettings, plan: "Plan", as_json: bool) -> None:
    """Test live services over HTTP.

    Models × modes × blocks × keys are tested, with a receiver of callbacks.
    """
    from functools import partial

    from assay_research.matrix.matrix import run_matrix
    from assay_research.matrix.table import configurations, rate_table, spread_table, throughput_table
    from assay_research.runs.runs import read_run

    measure = partial(run_matrix, note=partial(click.echo, err=True))
    page = _measure(measure, plan, run.run_name, run.output, "testing", "tests")
    found = configurations(read_run(page.parent, "matrix").cells)
    if as_json:
        _emit("matrix", page, configurations=[row.as_dict() for row in found])
        return
    for one in found:
        table(*rate_table(one), title=f"{one.model}, {one.mode}: valid rates")
    table(*spread_table(found), title="largest minus smallest valid rate of the blocks")
    table(*throughput_table(found), title="throughput")
    click.echo(f"report: {page}")


@measurement("redteam", "assay_research.redteam.run:RedteamPlan", "--models reference:qwen3 --searched 0")
def redteam(run: RunSettings, plan: "RedteamPlan", as_json: bool) -> None:
    """Run every attacker against every preset.

    Gives cost, error, residuals, and who catches it after how many nonces.
    """
    from assay_research.redteam import tables as team
    from assay_research.redteam.field import PRESETS
    from assay_research.redteam.run import run_redteam
    from assay_research.runs.runs import read_run

    page = _measure(run_redteam, plan, run.run_name, run.output, "attacking", "cells")
    cells = read_run(page.parent, "redteam").cells
    places = [(*field, preset) for field in team.fields(cells) for preset in PRESETS]
    if as_json:
        _emit("redteam", page, paying=[team.paying(cells, *place) for place in places])
        return
    for place in places:
        table(*team.attack_table(cells, *place), title=", ".join(place))
    table(*team.paying_table(cells), title="attacks that save a quarter of the work by skipping")
    click.echo(f"report: {page}")


@measurement("responses", "assay_research.responses.run:ResponsesPlan", "--models reference:qwen3")
def responses(run: RunSettings, plan: "ResponsesPlan", as_json: bool) -> None:
    """Serve responses by every cheat, and score them.

    Scores are margins, sketches, and those of the rivals.
    """
    from assay_research.responses import tables as team
    from assay_research.responses.run import EXPERIMENT, run_responses
    from assay_research.responses.tables import caught_table, honest_table, standing_table
    from assay_research.runs.runs import read_run

    page = _measure(run_responses, plan, run.run_name, run.output, "serving", "cells")
    cells = read_run(page.parent, EXPERIMENT).cells
    if as_json:
        _emit("responses", page, cells=list(cells))
        return
    for place in team.places(cells):
        table(*caught_table(cells, place), title=", ".join(place))
    table(*honest_table(cells), title="honest provers")
    table(*standing_table(cells), title="int4 weights: tokens until 99 % are caught")
    click.echo(f"report: {page}")


@measurement("simulate", "assay_research.simulation.network:SimulationPlan", "--presets hardened --nodes 2000")
def simulate(run: RunSettings, plan: "SimulationPlan", network: "Network", as_json: bool) -> None:
    """Simulate a network over a year.

    Gives false accusations, time to catch, and junk that is paid under each verdict rule.
    """
    from assay_research.runs.runs import read_run
    from assay_research.simulation.network import run_simulation
    from assay_research.simulation.page import cell_name, honest_table, year_table

    plan = plan.model_copy(update={"network": network})
    page = _measure(run_simulation, plan, run.run_name, run.output, "simulating", "presets")
    cells = read_run(page.parent, "simulate").cells
    if as_json:
        _emit("simulate", page, presets=list(cells))
        return
    table(*honest_table(cells), title="honest nodes convicted in their whole life")
    for cell in cells:
        table(*year_table(cell), title=cell_name(cell))
    click.echo(f"report: {page}")


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


@experiment.add("report", RunSettings, example="assay poc experiment report --run-name approaches")
def report(run: RunSettings, as_json: bool) -> None:
    """Write the page of a run, also while it continues."""
    from assay_research.runs.report import build_report
    from assay_research.runs.runs import run_folder

    page = build_report(run_folder(run.output, run.run_name))
    if as_json:
        _emit("report", page)
    else:
        click.echo(page)


def _measure(run: Callable[..., None], plan: Any, run_name: str, output: Path, label: str, unit: str) -> Path:
    """Measure what is missing in a run's folder; return the path of its page."""
    from assay.models.load import model_info
    from assay.poc.engines.hf.engine import check_shape
    from assay_research.runs.report import build_report
    from assay_research.runs.runs import run_folder

    folder = run_folder(output, run_name)
    if hasattr(plan, "seq_len") and not folder.exists():
        for model in plan.models:
            check_shape(model_info(model), batch_size=plan.batch_size, seq_len=plan.seq_len)
    with progress_bar(label, unit) as progress:
        run(plan, folder, progress=progress)
    return build_report(folder)


def _emit(command: str, page: Path, **found: object) -> None:
    emit_json(f"assay.poc.experiment.{command}/1", {"folder": str(page.parent), "report": str(page), **found})
