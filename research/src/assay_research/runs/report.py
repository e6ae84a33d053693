"""One page for a whole run: whatever experiments its folder holds, each in its own sections."""

from importlib import import_module
from pathlib import Path

from assay._version import __version__
from assay.errors import DataError
from assay.pages.html import Cell, Report
from assay_research.runs.runs import RunRecords, read_run

PAGE = "report.html"

Table = tuple[tuple[str, ...], list[list[Cell]]]
"""Columns and rows, for the terminal and for the page."""

SECTIONS = {
    "approaches": "assay_research.approaches.page:draw",
    "weights": "assay_research.approaches.approaches:draw",
    "matrix": "assay_research.matrix.table:draw",
    "redteam": "assay_research.redteam.tables:draw",
    "responses": "assay_research.responses.tables:draw",
    "simulate": "assay_research.simulation.page:draw",
    "clusters": "assay_research.clusters.page:draw",
}
"""Experiment → function ``draw(report, run)`` of its sections, in their order; imported when the page is built."""


def build_report(folder: Path) -> Path:
    """Write the page of a run into its folder and return its path.

    The same records give the same bytes.

    Raises:
        DataError: The folder holds no experiment, or a file of it is malformed.
        StorageError: The page cannot be written.
    """
    present = {path.name.partition(".")[0] for path in folder.glob("*.jsonl*")}
    runs = [read_run(folder, experiment) for experiment in SECTIONS if experiment in present]
    if not runs:
        raise DataError(
            f"{folder} holds no experiment",
            wanted="files such as matrix.jsonl",
            do="run one first: `assay poc experiment --help` lists them",
        )
    report = Report(
        "Proof of Compute: experiments",
        "Every number with the noise that it carries.",
        command=f"assay poc experiment report --run-name {folder.name}",
        origin={"assay": __version__},
    )
    for run in runs:
        try:
            _draw(report, run)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise DataError(
                f"{folder / run.experiment}.jsonl: cells that cannot be read ({type(error).__name__}: {error})",
                wanted="the values that this version writes",
                do="move the file away and run the experiment again",
            ) from error
    report.write(folder / PAGE)
    return folder / PAGE


def _draw(report: Report, run: RunRecords) -> None:
    module, _, function = SECTIONS[run.experiment].partition(":")
    getattr(import_module(module), function)(report, run)
    with report.details(f"How {run.experiment} was run"):
        if not run.complete:
            report.paragraph("This experiment has not reached its end: cells are missing.")
        report.definitions({name.replace("_", " "): _text(value) for name, value in run.settings.items()})
        for origin in run.origins:
            report.definitions({name: _text(value) for name, value in origin.items() if value is not None})


def _text(value: object) -> str | int | float | bool | None:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
