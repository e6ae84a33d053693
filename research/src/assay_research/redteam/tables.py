"""The tables of the experiment, for the terminal, the documentation and the page of a run."""

from collections.abc import Iterable, Iterator
from typing import Any

from assay.files.jsonl import JsonObject
from assay.pages.html import Cell
from assay_research.redteam.field import CHECKED, PRESETS
from assay_research.runs.report import Curves, Section, Table
from assay_research.runs.runs import RunRecords

SAVED = 0.25
CURVES = ("int8 weights", "int4 weights", "first 25.0% dropped", "first 50.0% dropped", "last 25.0% dropped")

Cells = Iterable[JsonObject]


def _of(cells: Cells, kind: str, **wanted: str) -> Iterator[JsonObject]:
    for cell in cells:
        if cell.get("kind") == kind and all(cell[name] == value for name, value in wanted.items()):
            yield cell


def fields(cells: Cells) -> list[tuple[str, str]]:
    """Return the models and dtypes that every attacker was measured on."""
    return [(cell["model"], cell["dtype"]) for cell in _of(cells, "claims")]


def honest_errors(cells: Cells, model: str, dtype: str) -> dict[str, float]:
    """Return the mean ε of honest provers by preset."""
    cell = next(_of(cells, "honest", model=model, dtype=dtype))
    return {preset: values["error_mean"] for preset, values in cell["presets"].items()}


def paying(cells: Cells, model: str, dtype: str, preset: str) -> dict[str, Any]:
    """Return the attack with the least error among those that save a quarter of the work by skipping."""
    found = [
        {"name": cell["name"], "cost": cell["cost"], **cell["presets"][preset]}
        for cell in _of(cells, "attack", model=model, dtype=dtype)
        if cell["skips"] and _saves(cell) and preset in cell["presets"]
    ]
    best = min(found, key=lambda row: float(row["error_mean"]))
    honest = honest_errors(cells, model, dtype)[preset]
    slowest = [row["sequential_99"] for row in found]
    return {
        "model": model,
        "dtype": dtype,
        "preset": preset,
        "attack": best["name"],
        "cost": best["cost"],
        "error": best["error_mean"],
        "over_honest": best["error_mean"] / honest,
        "checked_99": None if None in slowest else max(slowest),
    }


def _saves(row: JsonObject) -> bool:
    """Return whether a quarter of the work is saved, to the hundredth that tables show."""
    return bool(round(row["cost"], 2) <= 1 - SAVED)


def paying_table(cells: Cells) -> Table:
    """Return, per model, dtype and preset, the attack that saves a quarter of the work at the smallest error."""
    rows: list[list[Cell]] = []
    for place in fields(cells):
        for preset in PRESETS:
            best = paying(cells, *place, preset)
            row: list[Cell] = [
                *place,
                preset,
                best["attack"],
                f"{best['cost']:.2f}",
                f"{best['error']:.3f}",
                f"{best['over_honest']:.1f}",
                _needs(best["checked_99"]),
            ]
            rows.append(row)
    return ("model", "dtype", "preset", "attack of the least error", "cost", "ε", "over honest", "checked"), rows


def attack_table(cells: Cells, model: str, dtype: str, preset: str) -> Table:
    """Return every attack against a preset, with the nonces to check until each rule catches 99 %."""
    honest = honest_errors(cells, model, dtype)[preset]
    rows: list[list[Cell]] = []
    for cell in _of(cells, "attack", model=model, dtype=dtype):
        if preset not in cell["presets"]:
            continue
        values = cell["presets"][preset]
        row: list[Cell] = [
            cell["name"],
            f"{cell['cost']:.2f}",
            f"{values['error_mean']:.3f}",
            f"{values['error_mean'] / honest:.1f}",
            f"{values['residual_rms']:.2g}",
            f"{values['auc']:.3f}",
            _needs(values["sequential_99"]),
            _needs(values["counting_99"]),
        ]
        rows.append(row)
    return ("attack", "cost", "ε", "over honest", "residual", "AUC", "sequential", "count"), rows


def _needs(nonces: int | None) -> Cell:
    return nonces if nonces is not None else "never"


def claim_table(cells: Cells, model: str, dtype: str) -> Table:
    """Return what a node can claim without running the model, and the nonces to check until each rule catches it."""
    rows: list[list[Cell]] = [
        [row["claim"], row["preset"], f"{row['cost']:.2f}", _needs(row["sequential_99"]), _needs(row["counting_99"])]
        for cell in _of(cells, "claims", model=model, dtype=dtype)
        for row in cell["rows"]
    ]
    return ("claim", "preset", "work per nonce", "sequential", "count"), rows


def audit_table(cells: Cells, model: str, dtype: str) -> Table:
    """Return how many simulated audits of honest provers accuse them."""
    rows: list[list[Cell]] = [
        [engine, preset, row["audits"], f"{row['accused']:.2%}", f"{row['published_rule']:.1%}"]
        for cell in _of(cells, "audits", model=model, dtype=dtype)
        for engine, presets in cell["engines"].items()
        for preset, row in presets.items()
    ]
    return ("prover", "preset", "audits", "accused by the sequential test", "by the published constants"), rows


def section(run: RunRecords) -> Section:
    """Return which attack pays, the tables of every model and dtype, and the curves of detection."""
    tables = {"Attacks that save a quarter of the work by skipping": paying_table(run.cells)}
    curves = []
    for place in fields(run.cells):
        where = ", ".join(place)
        for preset in PRESETS:
            tables[f"{where}, {preset}: nonces to check until 99 % are caught"] = attack_table(
                run.cells, *place, preset
            )
        tables[f"{where}: claims without a model"] = claim_table(run.cells, *place)
        tables[f"{where}: simulated audits of honest nodes"] = audit_table(run.cells, *place)
        curves.append(_curves(run.cells, *place))
    about = (
        "Among attacks that save a quarter of the work by skipping, the one with the smallest error ε of the unit "
        "state that is read. 'Checked' is the number of recomputed nonces after which the sequential test accuses the "
        "hardest of them with 99 %, at one false accusation in a thousand."
    )
    return Section("Red team: which attack pays?", about, tables, curves)


def _curves(cells: Cells, model: str, dtype: str) -> Curves:
    lines = {}
    for cell in _of(cells, "attack", model=model, dtype=dtype):
        if cell["name"] in CURVES:
            preset = "poc-2.0" if "poc-2.0" in cell["presets"] else "hardened"
            name, values = f"{cell['name']}, {preset}", cell["presets"][preset]
            lines |= {name: (CHECKED, values["sequential"]), f"-{name}": (CHECKED, values["counting"])}
    caption = f"{model}, {dtype}: caught by the sequential test (solid) and by the calibrated count (dashed)."
    return Curves(caption, "nonces checked", "share of attackers caught", lines)
