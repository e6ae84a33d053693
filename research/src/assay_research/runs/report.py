"""One page for a whole run: whatever experiments its folder holds, each in its own sections."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from assay import __version__
from assay.errors import DataError
from assay.files.jsonl import JsonObject
from assay.pages.figures import SERIES, figure, legend
from assay.pages.report import Badge, BadgeKind, Cell, Report
from assay_research.runs.runs import RunRecords, read_run

PAGE = "report.html"
_SHORT = 40  # characters of a label that fits into a plot

Table = tuple[tuple[str, ...], list[list[Cell]]]
"""Columns and rows, for the terminal and for the page."""

SECTIONS = {
    "approaches": "assay_research.approaches:section",
    "weights": "assay_research.approaches:weight_section",
    "matrix": "assay_research.matrix:section",
    "redteam": "assay_research.redteam.run:section",
    "responses": "assay_research.responses.run:section",
    "clusters": "assay_research.clusters.clusters:section",
}
"""Experiment → function that makes the `Section` of its records, in their order; imported when it
is called.
"""

VERDICTS: dict[Cell, BadgeKind] = {
    **dict.fromkeys(("yes", "inside noise", "pass", "succeeds"), "pass"),
    **dict.fromkeys(("no", "beyond noise", "over 5%", "fail", "fails"), "fail"),
    **dict.fromkeys(("partly", "undecided"), "undecided"),
}
"""Cells that the page shows as badges."""


@dataclass(frozen=True)
class Curves:
    """A plot.

    Args:
        caption, x, y: Texts below it and at its axes.
        lines: Places and values by name; a name with a dash before it is drawn dashed, unlabelled.
        bands: Lower and upper values around a line, by its name.
        log: Whether the axis of places is logarithmic.
    """

    caption: str
    x: str
    y: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    log: bool = True


@dataclass(frozen=True)
class Section:
    """What an experiment shows, in the terminal and on the page.

    Args:
        heading: Heading of the section.
        about: What the tables hold.
        tables: Tables by caption.
        curves: Plots, on the page alone.
        values: What ``--json`` prints in place of the tables.
    """

    heading: str
    about: str
    tables: dict[str, Table]
    curves: Sequence[Curves] = field(default=())
    values: JsonObject = field(default_factory=dict)


Column = str | Callable[[Any], Cell]
"""Name of a value of a row, a format of its values in braces, or a function of the row."""


def or_never(name: str) -> Column:
    """Return the column of a number that may never be reached."""
    return lambda row: "never" if row[name] is None else row[name]


def table_of(rows: Iterable[Any], columns: Mapping[str, Column]) -> Table:
    """Return a table of rows, which are mappings or dataclasses, with a column for each name."""

    def shown(row: Any, column: Column) -> Cell:
        if callable(column):
            return column(row)
        values = (
            row
            if isinstance(row, Mapping)
            else {field.name: getattr(row, field.name) for field in fields(row)}
        )
        return column.format_map(values) if "{" in column else values[column]

    return tuple(columns), [[shown(row, column) for column in columns.values()] for row in rows]


def section_of(run: RunRecords) -> Section:
    """Return what an experiment of a run shows."""
    module, _, function = SECTIONS[run.experiment].partition(":")
    section: Section = getattr(import_module(module), function)(run)
    return section


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
                f"{folder / run.experiment}.jsonl: cells that cannot be read "
                f"({type(error).__name__}: {error})",
                wanted="the values that this version writes",
                do="move the file away and run the experiment again",
            ) from error
    report.write(folder / PAGE)
    return folder / PAGE


def draw_section(report: Report, section: Section) -> None:
    """Draw a section on a page."""
    report.section(section.heading)
    if section.about:
        report.paragraph(section.about)
    for caption, (columns, rows) in section.tables.items():
        shown = [
            [Badge(str(cell), VERDICTS[cell]) if cell in VERDICTS else cell for cell in row]
            for row in rows
        ]
        report.table(columns, shown, caption=caption)
    for curves in section.curves:
        _plot(report, curves)


def _draw(report: Report, run: RunRecords) -> None:
    draw_section(report, section_of(run))
    with report.details(f"How {run.experiment} was run"):
        if not run.complete:
            report.paragraph("This experiment has not reached its end: cells are missing.")
        report.definitions(
            {name.replace("_", " "): _text(value) for name, value in run.settings.items()}
        )
        for origin in run.origins:
            report.definitions(
                {name: _text(value) for name, value in origin.items() if value is not None}
            )


def _plot(report: Report, curves: Curves) -> None:
    long = (
        max(map(len, curves.lines), default=0) > _SHORT
    )  # such labels stand below the plot, one a line
    fig, ax = figure(height=3.2 + 0.22 * len(curves.lines) * long)
    for index, (name, (x, y)) in enumerate(curves.lines.items()):
        solid = not name.startswith("-")
        colour = SERIES[(index if solid else index - 1) % len(SERIES)]
        ax.plot(x, y, "-" if solid else "--", color=colour, label=name if solid else None)
        if name in curves.bands:
            ax.fill_between(x, *curves.bands[name], color=colour, alpha=0.18, linewidth=0)
    if curves.log:
        ax.set_xscale("log")
    ax.set_xlabel(curves.x)
    ax.set_ylabel(curves.y)
    legend(ax, **({"loc": "upper left", "bbox_to_anchor": (0.0, -0.2)} if long else {}))
    report.figure(fig, curves.caption)


def _text(value: object) -> str | int | float | bool | None:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
