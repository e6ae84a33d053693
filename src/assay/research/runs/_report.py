"""One page for a whole run: whatever experiments its folder holds, each in its own sections.

An experiment adds its part by a function ``draw(report, run)`` that is named in :data:`SECTIONS`; its module is
imported when the page is built.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from assay._version import __version__
from assay.errors import DataError
from assay.reports import Report
from assay.research.runs._runs import RunRecords, read_run

PAGE = "report.html"

SECTIONS = {
    "approaches": "assay.research.approaches._page:draw",
    "weights": "assay.research.approaches._page:draw_weights",
    "matrix": "assay.research.matrix._table:draw",
    "redteam": "assay.research.redteam._tables:draw",
    "simulate": "assay.research.simulation._run:draw",
}
"""Experiment → module and function that draw its section, in the order of the page."""


def build_report(folder: Path) -> Path:
    """Write the page of a run into its folder and return its path.

    The same records give the same bytes.

    Raises:
        DataError: the folder holds no experiment, or a file of it is malformed.
        StorageError: the page cannot be written.
    """
    runs = [read_run(folder, experiment) for experiment in SECTIONS if _has(folder, experiment)]
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


def _has(folder: Path, experiment: str) -> bool:
    known = find_spec(SECTIONS[experiment].partition(":")[0]) is not None
    return known and any((folder / f"{experiment}.jsonl{suffix}").exists() for suffix in ("", ".partial"))


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
