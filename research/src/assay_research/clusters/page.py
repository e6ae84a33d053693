"""The page of a run on published sets."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from assay import stats
from assay.files.jsonl import JsonObject
from assay.pages.figures import MUTED, SERIES, figure, legend
from assay.pages.html import Cell, Report
from assay_research.clusters.clusters import (
    ASKED,
    CHECKED,
    COUNTS,
    FIRST,
    GRID,
    HONEST,
    NAMED,
    ORACLE,
    OURS,
    REAL,
    SIMULATED,
    CountRule,
)
from assay_research.runs.report import Table
from assay_research.runs.runs import RunRecords

# --------------------------------------------------------------------------------------------------
# The figures of a run: what each rule said of honest machines and of cheats, by build.

SOON = 60  # nonces within which a cheat should be caught


def summarise(cells: Iterable[JsonObject]) -> JsonObject:
    """Return the figures of every build and the faults of every model; the cells are those of a run."""
    cells = list(cells)
    folds = [cell for cell in cells if "tallies" in cell]
    names = dict.fromkeys(cell["build"] for cell in folds)
    return {
        "builds": [_build(name, [cell for cell in folds if cell["build"] == name]) for name in names],
        "models": [{k: v for k, v in cell.items() if k != "key"} for cell in cells if "faulty_sets" in cell],
    }


def _build(name: str, folds: Sequence[JsonObject]) -> JsonObject:
    tallies: dict[tuple[str, str, str], list[JsonObject]] = {}
    for fold in folds:
        for sort, cheat, rule, tally in fold["tallies"]:
            tallies.setdefault((sort, cheat, rule), []).append(tally)
    rows = [
        {"sort": sort, "cheat": cheat, "rule": rule, **_row(found, sort)}
        for (sort, cheat, rule), found in tallies.items()
    ]
    return {
        "build": name,
        "machines": len(folds),
        "kinds": [fold["kind"] for fold in folds],
        "effects": sorted({fold["effect"] for fold in folds if fold["effect"] is not None}),
        "spreads": [min(fold["spread"] for fold in folds), max(fold["spread"] for fold in folds)],
        "sizes": [[fold["machine"], other, size] for fold in folds for other, size in fold["sizes"].items()],
        "rows": rows,
    }


def _row(tallies: Sequence[JsonObject], sort: str) -> JsonObject:
    """Return the figures of a rule for one sort of audits, over all folds."""
    audits = sum(tally["audits"] for tally in tallies)
    curve = np.sum([tally["accused"] for tally in tallies], axis=0) / audits
    honest = np.sum([tally["honest"] for tally in tallies], axis=0) / audits
    found: JsonObject = {
        "audits": audits,
        "accused": float(curve[-1]),
        "soon": float(curve[GRID.index(SOON)]),
        "median": _reached(curve, 0.5),
        "most": _reached(curve, 0.99),
        "honest": dict(zip(map(str, ASKED), honest.tolist(), strict=True)),
        "curve": [round(float(value), 4) for value in curve],
    }
    if sort == HONEST:
        found |= _interval(tallies)
    return found


def _interval(tallies: Sequence[JsonObject]) -> JsonObject:
    """Return an interval of the share accused, and the worst pair.

    Audits of one machine are not independent, so the interval is over the machines that were left out, one a tally. It
    holds for so few machines, and is wide where hardly any audit accuses.
    """
    ends = [end for tally in tallies for end in tally["ends"]]
    machines = [index for index, tally in enumerate(tallies) for _ in tally["ends"]]
    low, high = stats.grouped_share_interval(ends, machines)
    return {"low": low, "high": high, "worst": max(ends), "pairs": len(ends)}


def _reached(curve: Any, share: float) -> int | None:
    """Return the first number of nonces after which so large a share of the audits accuses."""
    return next((count for count, accused in zip(GRID, curve, strict=True) if accused >= share), None)


def honest_table(summary: JsonObject) -> Table:
    """Return what every rule says of honest audits."""
    rows: list[list[Cell]] = [
        [
            build["build"],
            row["rule"],
            f"{row['accused']:.2%}",
            f"{row['low']:.2%} to {row['high']:.2%}",
            f"{row['worst']:.1%}",
            f"{row['honest']['300']:.0%}",
        ]
        for build, row in _rows(summary, HONEST)
    ]
    return ("build", "rule", "accused", "95 %", "worst pair", "called honest"), rows


def cheat_table(summary: JsonObject, sort: str) -> Table:
    """Return what every rule says of cheats, those with a name or the simulated ones."""
    rows: list[list[Cell]] = [
        [
            build["build"],
            row["cheat"],
            row["rule"],
            row["median"] or "never",
            row["most"] or "never",
            f"{row['soon']:.1%}",
            f"{row['accused']:.1%}",
            f"{row['honest']['64']:.1%} / {row['honest']['300']:.1%}",
        ]
        for build, row in _rows(summary, sort)
    ]
    return (
        ("build", "cheat", "rule", "median", "99 % by", f"by {SOON}", "by 300", "called honest, 64 / 300"),
        rows,
    )


def fault_table(summary: JsonObject) -> Table:
    """Return the sets and pairs with a fault of the place, by model."""
    rows: list[list[Cell]] = []
    for model in summary["models"]:
        for pair in model["faulty_pairs"]:
            audits = sum(pair["audits"].values())
            faulty = [f"{pair['audits'].get(word, 0) / audits:.0%}" if audits else "" for word in ("faulty", "fraud")]
            one, other = pair["sets"]
            place = f"{pair['share']:.0%}, {pair['ratio']:.1f} times"
            rows.append([f"{one} / {other}", pair["pattern"], place, pair["outcome"], *faulty])
    return ("sets", "bad places", "share, size", "verdict", "300: faulty", "300: fraud"), rows


def model_table(summary: JsonObject) -> Table:
    """Return the sets by model: copies, faulty ones and pairs, and how often sound pairs are called faulty."""
    rows: list[list[Cell]] = []
    for model in summary["models"]:
        samples = sum(model["sound_samples"].values())
        called = f"{model['sound_samples'].get('faulty', 0)} of {samples}" if samples else ""
        faulty = f"{len(model['faulty_sets'])} sets, {len(model['faulty_pairs'])} of {model['pairs']} pairs"
        rows.append([model["model"], len(model["sets"]), len(model["copies"]), f"{model['size']:.3f}", faulty, called])
    return ("model", "sets", "copies", "median distance", "faulty", "sound audits called faulty"), rows


def _rows(summary: JsonObject, sort: str) -> list[tuple[JsonObject, JsonObject]]:
    return [(build, row) for build in summary["builds"] for row in build["rows"] if row["sort"] == sort]


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
