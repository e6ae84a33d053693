"""The tables of the experiment, for the terminal, the documentation and the page of a run."""

from collections.abc import Iterable, Iterator
from typing import Any

from assay.files.jsonl import JsonObject
from assay.pages.figures import MUTED, SERIES, figure, legend
from assay.pages.html import Badge, Cell, Report
from assay_research.redteam.field import CHECKED, PRESETS, validator_format
from assay_research.runs.report import Table
from assay_research.runs.runs import RunRecords

SAVED = 0.25
IN_TIME = 20  # checked nonces within which an attack that pays should be caught
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


def searches(cells: Cells, model: str, dtype: str) -> list[JsonObject]:
    """Return the searches in the number format of the validator of a dtype: one, or none where nothing was searched.

    Runs of earlier versions have one search of a model, in the format of one of its dtypes, and do not say which. It is
    returned where all dtypes have one validator.
    """
    wanted = validator_format(dtype)
    found = list(_of(cells, "search", model=model))
    said = [cell for cell in found if cell.get("format") == wanted]
    formats = {validator_format(one) for place, one in fields(cells) if place == model}
    return said or [cell for cell in found if "format" not in cell and formats == {wanted}]


def search_table(cells: Cells, model: str, dtype: str) -> Table:
    """Return, for each number of positions read, the strategy of the least error that saves a quarter of the work."""
    honest = honest_errors(cells, model, dtype)["hardened"]
    rows: list[list[Cell]] = []
    for cell in searches(cells, model, dtype):
        for count in sorted({row["positions"] for row in cell["rows"]}):
            saving = [row for row in cell["rows"] if row["positions"] == count and _saves(row)]
            best = min(saving, key=lambda row: float(row["error_mean"]))
            error = best["error_mean"]
            rows.append([count, best["strategy"], f"{best['cost']:.2f}", f"{error:.3f}", f"{error / honest:.1f}"])
    return ("positions read", "best strategy", "cost", "ε", "over honest"), rows


def expert_table(cells: Cells) -> Table:
    """Return the errors of provers that ask fewer experts of a small mixture, beside honest ones."""
    rows: list[list[Cell]] = [
        [row["name"], f"{row['cost']:.2f}", f"{row['artifact']:.3f}", f"{row['hardened']:.3f}"]
        for cell in _of(cells, "experts")
        for row in cell["rows"]
    ]
    return ("prover", "cost", "ε, last position", "ε, all positions"), rows


def draw(report: Report, run: RunRecords) -> None:
    """Add which attack pays, plots of errors and of detection, and the tables of every model and dtype."""
    if not fields(run.cells):
        return
    report.section("Red team: which attack pays?")
    report.paragraph(
        "Among attacks that save a quarter of the work by skipping, the one with the smallest error ε of the unit "
        "state that is read. 'Checked' is the number of recomputed nonces after which the sequential test accuses the "
        "hardest of them with 99 %, at one false accusation in a thousand."
    )
    columns, rows = paying_table(run.cells)
    for row in rows:
        caught = row[-1]
        soon = isinstance(caught, int) and caught <= IN_TIME
        row[-1] = Badge(str(caught), "pass" if soon else "fail")
    report.table(columns, rows)
    for place in fields(run.cells):
        _field(report, run.cells, *place)
    columns, rows = expert_table(run.cells)
    if rows:
        report.section("Skipping experts")
        report.table(columns, rows)


def _field(report: Report, cells: Cells, model: str, dtype: str) -> None:
    report.section(f"Attacks on {model}, {dtype}")
    _errors(report, cells, model, dtype)
    _curves(report, cells, model, dtype)
    for preset in PRESETS:
        with report.details(f"All attacks against {preset}"):
            caption = "Nonces to check until 99 % are caught, by rule"
            report.table(*attack_table(cells, model, dtype, preset), caption=caption)
    report.table(*claim_table(cells, model, dtype), caption="Claims without a model")
    report.table(*audit_table(cells, model, dtype), caption="Simulated audits of honest nodes")
    columns, rows = search_table(cells, model, dtype)
    if rows:
        caption = (
            f"The attacker's best strategy, by the number of positions read; searched in {validator_format(dtype)}"
        )
        report.table(columns, rows, caption=caption)


def _errors(report: Report, cells: Cells, model: str, dtype: str) -> None:
    fig, ax = figure(height=3.8)
    labels = {"artifact": "last position (published presets)", "hardened": "all positions (hardened)"}
    for color, (preset, label) in zip(SERIES, labels.items(), strict=False):
        points = [
            (cell["cost"], cell["presets"][preset]["error_mean"])
            for cell in _of(cells, "attack", model=model, dtype=dtype)
            if preset in cell["presets"] and cell["presets"][preset]["error_mean"] > 0
        ]
        costs, errors = zip(*points, strict=True)
        ax.scatter(costs, errors, s=18, color=color, label=label)
    honest = honest_errors(cells, model, dtype)["hardened"]
    for multiple in (1, 20):
        ax.axhline(multiple * honest, color=MUTED, linewidth=0.8, linestyle=":")
        ax.annotate(f"{multiple} × honest", (0.0, multiple * honest), color=MUTED, fontsize=8, va="bottom")
    ax.set_yscale("log")
    ax.set_xlabel("work done (honest node = 1)")
    ax.set_ylabel("error ε of the state")
    legend(ax)
    report.figure(fig, "Error of the state that is read against the work done; one point per attack.")


def _curves(report: Report, cells: Cells, model: str, dtype: str) -> None:
    fig, ax = figure(height=3.6)
    shown = [cell for cell in _of(cells, "attack", model=model, dtype=dtype) if cell["name"] in CURVES]
    for color, cell in zip(SERIES, shown, strict=False):
        preset = "poc-2.0" if "poc-2.0" in cell["presets"] else "hardened"
        values: dict[str, Any] = cell["presets"][preset]
        ax.plot(CHECKED, values["sequential"], color=color, label=f"{cell['name']}, {preset}")
        ax.plot(CHECKED, values["counting"], color=color, linestyle="--", linewidth=0.9)
    ax.set_xscale("log")
    ax.set_xlabel("nonces checked")
    ax.set_ylabel("share of attackers caught")
    legend(ax, loc="lower right")
    report.figure(fig, "Share of attackers caught by the sequential test (solid) and by the calibrated count (dashed).")
