"""``assay poc experiment``: the published tables measured again, resumable, with one report per
run.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
from pydantic import Field, create_model

from assay.cli.flags import FOLDER
from assay.framework.groups import Group
from assay.framework.output import emit_json, progress_bar, table
from assay.settings import Settings

if TYPE_CHECKING:
    from assay_research.runs.runs import Plan

experiment = Group("poc experiment", "Measure the published tables again.")


class RunSettings(Settings):
    """Folder of a run."""

    run_name: Annotated[str, "NAME"] = Field(
        description="Folder of the run; the same name continues it."
    )
    output: Annotated[Path, FOLDER] = Field(
        Path("experiments"), description="Directory that holds the folders of all runs."
    )


def add_measurement(name: str, plan: str, example: str, unit: str, text: str) -> None:
    """Add the command that measures by a plan, in a folder that has its name by default."""

    def measure(run: Any, plan: Any, *network: Settings, as_json: bool) -> None:
        from assay_research.runs.runs import run_folder

        plan = plan.model_copy(update={"network": network[0]}) if network else plan
        folder = run_folder(run.output, run.run_name)
        if hasattr(plan, "seq_len") and not folder.exists():
            from assay.models.catalogue import model_info
            from assay.poc.engines.hf.shapes import check_shape

            for model in plan.models:
                check_shape(model_info(model), batch_size=plan.batch_size, seq_len=plan.seq_len)
        measure_and_show(plan, folder, as_json, f"assay.poc.experiment.{name}/1", unit)

    measure.__doc__ = text
    description = RunSettings.model_fields["run_name"].description
    field: Any = (Annotated[str, "NAME"], Field(name, description=description))
    kind = create_model(f"{name.title()}Settings", __base__=RunSettings, run_name=field)
    line = f"assay poc experiment {name} {example}"
    experiment.add(name, kind, plan, panel="Research", example=line, resumable=True)(measure)


def measure_and_show(plan: "Plan", folder: Path, as_json: bool, schema: str, unit: str) -> None:
    """Measure what is missing in a run's folder; print the tables of what it holds, or its values
    as JSON.
    """
    from assay_research.runs.report import build_report, section_of
    from assay_research.runs.runs import read_run

    with progress_bar("measuring", unit) as progress:
        plan.measure(folder, progress=progress, note=partial(click.echo, err=True))
    section = section_of(read_run(folder, plan.experiment))
    page = build_report(folder)
    if as_json:
        emit_json(schema, {"folder": str(folder), "report": str(page), **section.values})
        return
    for title, shown in section.tables.items():
        table(*shown, title=title)
    click.echo(f"report: {page}")


add_measurement(
    "approaches",
    "assay_research.approaches:ApproachPlan",
    "--models reference:qwen3 --nonces 128",
    "approaches",
    """Measure every approach and its cost.

    Distances are held against the chord law, with the spread of blocks and separability.
    """,
)
add_measurement(
    "weights",
    "assay_research.approaches:WeightPlan",
    "--models reference:llama --nonces 256",
    "blocks",
    """Compare trained weights with drawn ones.

    Weights are drawn per block: all of them, or the embeddings alone.
    """,
)
add_measurement(
    "matrix",
    "assay_research.matrix:MatrixPlan",
    "--models reference:qwen3 --duration 10",
    "tests",
    """Test live services over HTTP.

    Models × modes × blocks × keys are tested, with a receiver of callbacks.
    """,
)
add_measurement(
    "redteam",
    "assay_research.redteam.run:RedteamPlan",
    "--models reference:qwen3 --nonces 64",
    "cells",
    """Run every attacker against every preset.

    Gives cost, error, residuals, and who catches it after how many nonces.
    """,
)
add_measurement(
    "responses",
    "assay_research.responses.run:ResponsesPlan",
    "--models reference:qwen3",
    "cells",
    """Serve responses by every cheat, and score them.

    Scores are margins, sketches, and those of the rivals.
    """,
)


@experiment.add("report", RunSettings, example="assay poc experiment report --run-name approaches")
def report(run: RunSettings, as_json: bool) -> None:
    """Write the page of a run, also while it continues."""
    from assay_research.runs.report import build_report
    from assay_research.runs.runs import run_folder

    page = build_report(run_folder(run.output, run.run_name))
    if as_json:
        emit_json(
            "assay.poc.experiment.report/1", {"folder": str(page.parent), "report": str(page)}
        )
    else:
        click.echo(page)
