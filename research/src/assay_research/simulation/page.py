"""What the simulated year shows."""

from collections.abc import Sequence

from assay import stats
from assay.files.jsonl import JsonObject
from assay.pages.html import Cell
from assay_research.runs.report import Curves, Section, Table
from assay_research.runs.runs import RunRecords


def section(run: RunRecords) -> Section:
    """Return what every rule does to every kind of node."""
    settings = run.settings
    about = (
        f"Every round {settings['checkers']} of {settings['validators']} validators, drawn by stake, recompute "
        f"{settings['checked']} nonces of every node. 'Reward paid' is the share of the year's reward that nodes of a "
        "kind drew before they were convicted. Honest nodes should be paid all of it. Under a predictive law every "
        "honest node has a scale of noise of its own, which the law does not know."
    )
    tables = {"Honest nodes convicted in their whole life": honest_table(run.cells)}
    tables |= {cell_name(cell): year_table(cell) for cell in run.cells}
    heading = f"A network of {settings['nodes']} nodes over {settings['rounds']} rounds"
    return Section(heading, about, tables, [_curves(cell) for cell in run.cells])


def _curves(cell: JsonObject) -> Curves:
    lines = {}
    for rule in dict.fromkeys(row["rule"] for row in cell["rows"]):
        rows = [row for row in cell["rows"] if row["rule"] == rule and row["junk"]]
        lines[rule] = ([100 * row["junk"] for row in rows], [100 * row["paid"] for row in rows])
    x, y = "share of a node's nonces that is invented, %", "share of the year's reward paid, %"
    return Curves(f"{cell_name(cell)}: reward paid to nodes that invent a share of their nonces.", x, y, lines)


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
