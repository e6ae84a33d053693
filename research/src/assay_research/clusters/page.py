"""The figures of a run on published sets: what each rule said of honest machines and of cheats, by build."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from assay import stats
from assay.files.jsonl import JsonObject
from assay.pages.html import Cell
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
from assay_research.runs.report import Curves, Section, Table
from assay_research.runs.runs import RunRecords

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


def section(run: RunRecords) -> Section:
    """Return what every rule says of the machines and cheats of a run."""
    summary = summarise(run.cells)
    about = (
        "Sets of one block, key, length and model are compared. Copies of an earlier set are left out, and so are sets "
        "and pairs whose distances depend on the place in the batch. Then one machine is left out, and the law and the "
        f"effect come from the others. Audits of {CHECKED} nonces are drawn without replacement. The interval is over "
        "machines: Gaffke's bounds for the mean of few shares, which leave room for machines unlike those measured."
    )
    tables = {
        "Sets": model_table(summary),
        f"Pairs with a fault of the place, in full and in audits of {CHECKED} nonces": fault_table(summary),
        "Honest machines that the law does not know": honest_table(summary),
        "Other builds passed off as this one": cheat_table(summary, REAL),
        "Simulated cheats at 1.4 times the honest median": cheat_table(summary, SIMULATED),
    }
    curves = [one for build in summary["builds"] for one in _curves(build)]
    return Section("Sets of nonces that networks published", about, tables, curves)


def _curves(build: JsonObject) -> Iterator[Curves]:
    """Yield the share of audits accused against the nonces checked, for each cheat."""
    wanted = [row for row in build["rows"] if row["rule"] in DRAWN and row["sort"] != HONEST]
    for place in dict.fromkeys((row["sort"], row["cheat"]) for row in wanted):
        rows = [row for row in wanted if (row["sort"], row["cheat"]) == place]
        lines = {row["rule"]: (GRID, [100 * share for share in row["curve"]]) for row in rows}
        caption = f"{build['build']}, {place[1]}: share of audits that accuse."
        yield Curves(caption, "nonces checked", "audits that accuse, %", lines)
