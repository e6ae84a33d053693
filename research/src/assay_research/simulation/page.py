"""Tables and plot of the simulated year."""

from collections.abc import Sequence

from assay import stats
from assay.files.jsonl import JsonObject
from assay.pages.figures import SERIES, figure, legend
from assay.pages.html import Cell, Report
from assay_research.runs.report import Table
from assay_research.runs.runs import RunRecords

_SHOWN = 1e-4  # least share on the logarithmic axis


def draw(report: Report, run: RunRecords) -> None:
    """Add a table and a plot of what every rule does to every kind of node."""
    settings = run.settings
    report.section(f"A network of {settings['nodes']} nodes over {settings['rounds']} rounds")
    report.paragraph(
        f"Every round {settings['checkers']} of {settings['validators']} validators, drawn by stake, recompute "
        f"{settings['checked']} nonces of every node. 'Reward paid' is the share of the year's reward that nodes of a "
        "kind drew before they were convicted. Honest nodes should be paid all of it. Under a predictive law every "
        "honest node has a scale of noise of its own, which the law does not know."
    )
    report.table(*honest_table(run.cells), caption="Honest nodes convicted in their whole life")
    for cell in run.cells:
        name = cell_name(cell)
        _plot(report, name, cell)
        report.table(*year_table(cell), caption=name)


def cell_name(cell: JsonObject) -> str:
    """Return what a cell is called in captions."""
    return f"{cell['preset']}, {cell['dtype']}, {_law(cell)} law"


def _law(cell: JsonObject) -> str:
    return str(cell.get("law", "default"))  # runs of the first version knew no other


def honest_table(cells: Sequence[JsonObject]) -> Table:
    """Return how many honest nodes their own account convicts, by law, dtype and preset."""
    rows: list[list[Cell]] = []
    for cell in cells:
        honest = next(row for row in cell["rows"] if row["rule"] == "lifetime" and row["kind"] == "honest")
        low, high = stats.proportion_interval(honest["convicted"], honest["nodes"])
        share = f"{low:.2e} to {high:.2e}"
        rows.append([_law(cell), cell["dtype"], cell["preset"], f"{honest['convicted']} of {honest['nodes']}", share])
    return ("law", "format", "preset", "honest nodes convicted", "share, 95 % interval"), rows


def year_table(cell: JsonObject) -> Table:
    """Return what every rule does to every kind of node, for one preset, dtype and law."""
    rows: list[list[Cell]] = []
    for row in cell["rows"]:
        cells: list[Cell] = [
            row["rule"],
            row["kind"],
            f"{row['convicted']} of {row['nodes']}",
            "never" if row["rounds_median"] is None else row["rounds_median"],
            "never" if row["rounds_99"] is None else row["rounds_99"],
            f"{row['paid']:.2%}",
        ]
        rows.append(cells)
    return ("rule", "kind of node", "convicted", "median round", "99 % convicted by round", "reward paid"), rows


def _plot(report: Report, name: str, cell: JsonObject) -> None:
    fig, ax = figure()
    rules = list(dict.fromkeys(row["rule"] for row in cell["rows"]))
    for color, rule in zip(SERIES, rules, strict=False):
        rows = [row for row in cell["rows"] if row["rule"] == rule and row["junk"]]
        shares = [100 * row["junk"] for row in rows]
        ax.plot(shares, [100 * max(row["paid"], _SHOWN) for row in rows], "o-", color=color, label=rule)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("share of a node's nonces that is invented, %")
    ax.set_ylabel("share of the year's reward paid, %")
    legend(ax)
    report.figure(fig, f"{name}: reward paid to nodes that invent a share of their nonces, by verdict rule.")
