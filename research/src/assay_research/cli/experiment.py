"""``assay poc experiment``: the published tables measured again, resumable, with one report per run."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
from pydantic import Field, create_model

from assay.cli.flags import OUTPUT
from assay.cli.framework import Group
from assay.cli.output import emit_json, progress_bar, table
from assay.settings import Settings

if TYPE_CHECKING:
    from assay_research.approaches.approaches import ApproachPlan, WeightPlan
    from assay_research.matrix.matrix import Plan
    from assay_research.redteam.run import RedteamPlan
    from assay_research.responses.run import ResponsesPlan
    from assay_research.runs.runs import RunRecords
    from assay_research.simulation.network import Network, SimulationPlan

experiment = Group("poc experiment", "Measure the published tables again.")


class RunSettings(Settings):
    """Folder of a run."""

    run_name: Annotated[str, "NAME"] = Field(description="Folder of the run; the same name continues it.")
    output: Annotated[Path, OUTPUT] = Field(
        Path("experiments"), description="Directory that holds the folders of all runs."
    )


def measurement(name: str, plan: str, example: str) -> Any:
    """Return the decorator of a command that measures by a plan, in a folder that has its name by default."""
    description = RunSettings.model_fields["run_name"].description
    field: Any = (Annotated[str, "NAME"], Field(name, description=description))
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

    found, page = _measure(run_approaches, "approaches", plan, run, "measuring", "approaches")
    _show(found, page, as_json, approaches=found.cells)


@measurement("weights", "assay_research.approaches.approaches:WeightPlan", "--models reference:llama --nonces 256")
def weights(run: RunSettings, plan: "WeightPlan", as_json: bool) -> None:
    """Compare trained weights with drawn ones.

    Weights are drawn per block: all of them, or the embeddings alone.
    """
    from dataclasses import asdict

    from assay_research.approaches.approaches import run_weights, weight_rows

    found, page = _measure(run_weights, "weights", plan, run, "measuring", "blocks")
    _show(found, page, as_json, rows=[asdict(row) for row in weight_rows(found.cells)])


@measurement("matrix", "assay_research.matrix.matrix:Plan", "--models reference:qwen3 --duration 10")
def matrix(run: RunSettings, plan: "Plan", as_json: bool) -> None:
    """Test live services over HTTP.

    Models × modes × blocks × keys are tested, with a receiver of callbacks.
    """
    from functools import partial

    from assay_research.matrix.matrix import configurations, run_matrix

    measure = partial(run_matrix, note=partial(click.echo, err=True))
    found, page = _measure(measure, "matrix", plan, run, "testing", "tests")
    _show(found, page, as_json, configurations=[row.as_dict() for row in configurations(found.cells)])


@measurement("redteam", "assay_research.redteam.run:RedteamPlan", "--models reference:qwen3 --nonces 64")
def redteam(run: RunSettings, plan: "RedteamPlan", as_json: bool) -> None:
    """Run every attacker against every preset.

    Gives cost, error, residuals, and who catches it after how many nonces.
    """
    from assay_research.redteam import run as team
    from assay_research.redteam.field import PRESETS
    from assay_research.redteam.run import run_redteam

    found, page = _measure(run_redteam, "redteam", plan, run, "attacking", "cells")
    places = [(*field, preset) for field in team.fields(found.cells) for preset in PRESETS]
    _show(found, page, as_json, paying=[team.paying(found.cells, *place) for place in places])


@measurement("responses", "assay_research.responses.run:ResponsesPlan", "--models reference:qwen3")
def responses(run: RunSettings, plan: "ResponsesPlan", as_json: bool) -> None:
    """Serve responses by every cheat, and score them.

    Scores are margins, sketches, and those of the rivals.
    """
    from assay_research.responses.run import run_responses

    found, page = _measure(run_responses, "responses", plan, run, "serving", "cells")
    _show(found, page, as_json, cells=found.cells)


@measurement("simulate", "assay_research.simulation.network:SimulationPlan", "--presets hardened --nodes 2000")
def simulate(run: RunSettings, plan: "SimulationPlan", network: "Network", as_json: bool) -> None:
    """Simulate a network over a year.

    Gives false accusations, time to catch, and junk that is paid under each verdict rule.
    """
    from assay_research.simulation.network import run_simulation

    plan = plan.model_copy(update={"network": network})
    found, page = _measure(run_simulation, "simulate", plan, run, "simulating", "presets")
    _show(found, page, as_json, presets=found.cells)


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


def _measure(
    measure: Callable[..., None], experiment: str, plan: Any, run: RunSettings, label: str, unit: str
) -> "tuple[RunRecords, Path]":
    """Measure what is missing in a run's folder; return what it holds, and the path of its page."""
    from assay.models.load import model_info
    from assay.poc.engines.hf.engine import check_shape
    from assay_research.runs.report import build_report
    from assay_research.runs.runs import read_run, run_folder

    folder = run_folder(run.output, run.run_name)
    if hasattr(plan, "seq_len") and not folder.exists():
        for model in plan.models:
            check_shape(model_info(model), batch_size=plan.batch_size, seq_len=plan.seq_len)
    with progress_bar(label, unit) as progress:
        measure(plan, folder, progress=progress)
    return read_run(folder, experiment), build_report(folder)


def _show(found: "RunRecords", page: Path, as_json: bool, **values: object) -> None:
    """Print the tables of an experiment, or its values as JSON."""
    from assay_research.runs.report import section_of

    if as_json:
        _emit(found.experiment, page, **values)
        return
    for title, shown in section_of(found).tables.items():
        table(*shown, title=title)
    click.echo(f"report: {page}")


def _emit(command: str, page: Path, **found: object) -> None:
    emit_json(f"assay.poc.experiment.{command}/1", {"folder": str(page.parent), "report": str(page), **found})
