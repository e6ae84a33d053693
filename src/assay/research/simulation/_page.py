"""The simulated network on the page of a run."""

from typing import TYPE_CHECKING

from assay.reports import SERIES, Cell, JsonObject, Report, figure, legend
from assay.research.runs import RunRecords, section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLUMNS", "draw", "table_rows"]

COLUMNS = ("rule", "node", "convicted", "rounds, median", "rounds, 99 %", "paid")
_SHOWN = 1e-4  # least share on the logarithmic axis


@section("simulate")
def draw(report: Report, run: RunRecords) -> None:
    """Add what every rule does to every kind of node, and the junk that is paid for."""
    settings = run.settings
    report.section(f"A network of {settings['nodes']} nodes over {settings['rounds']} rounds")
    report.paragraph(
        f"Every round {settings['checkers']} of {settings['validators']} validators, drawn by stake, recompute "
        f"{settings['checked']} nonces of every node. 'Paid' is the share of the year's reward that nodes of a kind "
        "drew before they were convicted. An honest node should be paid 1."
    )
    for cell in run.cells:
        name = f"{cell['preset']}, {cell['dtype']}"
        report.figure(_plot(cell), f"{name}: share of invented nonces that is paid for, by verdict rule.")
        report.table(COLUMNS, table_rows(cell), caption=name)


def table_rows(cell: JsonObject) -> list[list[Cell]]:
    """Return the rows of :data:`COLUMNS` for one preset."""
    return [
        [
            row["rule"],
            row["kind"],
            f"{row['convicted']} of {row['nodes']}",
            row["rounds_median"] if row["rounds_median"] is not None else "never",
            row["rounds_99"] if row["rounds_99"] is not None else "never",
            f"{row['paid']:.2%}",
        ]
        for row in cell["rows"]
    ]


def _plot(cell: JsonObject) -> "Figure":
    fig, ax = figure()
    rules = list(dict.fromkeys(row["rule"] for row in cell["rows"]))
    for color, rule in zip(SERIES, rules, strict=False):
        rows = [row for row in cell["rows"] if row["rule"] == rule and row["junk"]]
        shares = [100 * row["junk"] for row in rows]
        ax.plot(shares, [100 * max(row["paid"], _SHOWN) for row in rows], "o-", color=color, label=rule)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("invented share of a node's nonces, %")
    ax.set_ylabel("reward drawn in the year, %")
    legend(ax)
    return fig
