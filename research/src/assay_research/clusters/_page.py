"""The page of a run on published sets."""

from collections.abc import Sequence

from assay.reports import MUTED, SERIES, JsonObject, Report, figure, legend
from assay.research.clusters._folds import CHECKED, GRID
from assay.research.clusters._rules import COUNTS, FIRST, NAMED, ORACLE, OURS, CountRule
from assay.research.clusters._summary import (
    HONEST,
    REAL,
    SIMULATED,
    cheat_table,
    fault_table,
    honest_table,
    model_table,
    summarise,
)
from assay.research.runs import RunRecords

DRAWN = (OURS, NAMED, FIRST, CountRule(*COUNTS[0]).name, ORACLE)


def draw(report: Report, run: RunRecords) -> None:
    """Add the sections of the experiment."""
    summary = summarise(run.cells)
    report.section("Sets of nonces that networks published")
    report.paragraph(
        "Sets of one block, key, length and model are compared. Copies of an earlier set are left out, and so are sets "
        "and pairs whose distances depend on the place in the batch."
    )
    report.table(*model_table(summary))
    columns, rows = fault_table(summary)
    if rows:
        with report.details(f"{len(rows)} pairs with a fault of the place, in full and in audits of {CHECKED} nonces"):
            report.table(columns, rows)
    if not summary["builds"]:
        report.paragraph("No build has three sound machines, so no law of a machine left out can be made.")
        return
    report.section("Honest machines that the law does not know")
    report.paragraph(
        f"One machine is left out, the law comes from the others, and so does the effect. Audits of {CHECKED} nonces, "
        "drawn without replacement. The interval is over machines: Gaffke's bounds for the mean of few shares, which "
        "leave room for machines unlike those that were measured."
    )
    for build in summary["builds"]:
        _sizes(report, build)
    report.table(*honest_table(summary))
    report.section("Other builds passed off as this one")
    if any(row["sort"] == REAL for build in summary["builds"] for row in build["rows"]):
        report.table(*cheat_table(summary, REAL))
    else:
        report.paragraph("No other build of the same family was published for the same round.")
    report.section("Simulated cheats at 1.4 times the honest median")
    for build in summary["builds"]:
        _curves(report, build)
    report.table(*cheat_table(summary, SIMULATED))


def _sizes(report: Report, build: JsonObject) -> None:
    """Plot the median distance of every machine from every other one."""
    machines = list(dict.fromkeys(one for one, _, _ in build["sizes"]))
    fig, ax = figure(height=1.0 + 0.28 * len(machines))
    for row, machine in enumerate(machines):
        found = [size for one, _, size in build["sizes"] if one == machine]
        ax.plot(found, [row] * len(found), "o", color=SERIES[0], alpha=0.6)
    ax.set_yticks(range(len(machines)), [f"{k}, {i}" for i, k in enumerate(build["kinds"])])
    ax.set_xlabel("median L2 distance from each other machine")
    ax.set_xlim(left=0)
    report.figure(fig, f"{build['build']}: how far machines of one build lie from each other.")


def _curves(report: Report, build: JsonObject) -> None:
    """Plot the share of audits accused against the nonces checked, for honest machines and each cheat."""
    wanted = [row for row in build["rows"] if row["rule"] in DRAWN]
    for sort, cheat in dict.fromkeys((row["sort"], row["cheat"]) for row in wanted):
        if sort != HONEST:
            _curve(report, build["build"], cheat, [r for r in wanted if (r["sort"], r["cheat"]) == (sort, cheat)])


def _curve(report: Report, build: str, cheat: str, rows: Sequence[JsonObject]) -> None:
    fig, ax = figure(height=2.6)
    colours = dict(zip(DRAWN, (*SERIES[:4], MUTED), strict=True))
    for row in rows:
        style = "--" if row["rule"] == ORACLE else "-"
        ax.plot(GRID, [100 * share for share in row["curve"]], style, color=colours[row["rule"]], label=row["rule"])
    ax.set_xscale("log")
    ax.set_xlabel("nonces checked")
    ax.set_ylabel("audits that accuse, %")
    legend(ax)
    report.figure(fig, f"{build}, {cheat}: share of audits that accuse.")
