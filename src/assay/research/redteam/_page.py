"""The red team on the page of a run."""

from typing import TYPE_CHECKING, Any

from assay.reports import MUTED, SERIES, Badge, Cell, JsonObject, Report, figure, legend
from assay.research.redteam import _tables as tables
from assay.research.redteam._detect import CHECKED
from assay.research.redteam._field import PRESETS
from assay.research.runs import RunRecords, section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]

CURVES = ("int8 weights", "int4 weights", "first 25.0% dropped", "first 50.0% dropped", "last 25.0% dropped")
REFERENCE = "bfloat16"


@section("redteam")
def draw(report: Report, run: RunRecords) -> None:
    """Add which attack pays, error against cost, curves of detection, and all tables."""
    fields = tables.fields(run.cells)
    if not fields:
        return
    report.section("Red team: which attack pays?")
    report.paragraph(
        "Among attacks that save a quarter of the work by skipping, the one with the smallest error ε of the unit "
        "state that is read. 'Caught' is after how many checked nonces the sequential test accuses the hardest of them "
        "with 99 %, at one false accusation in a thousand."
    )
    report.table(
        ("model", "dtype", "preset", "cheapest error", "cost", "ε", "over honest", "caught"),
        [row for model, dtype in fields for row in _paying(run.cells, model, dtype)],
    )
    for model, dtype in fields:
        _field(report, run.cells, model, dtype)
    _experts(report, run.cells)


def _paying(cells: tuple[JsonObject, ...], model: str, dtype: str) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    for preset in PRESETS:
        best = tables.paying(cells, model, dtype, preset)
        caught = best["checked_99"]
        badge = Badge(f"{caught} nonces" if caught else "never", "pass" if caught and caught <= 20 else "fail")
        size = [f"{best['cost']:.2f}", f"{best['error']:.3f}", f"{best['over_honest']:.1f}"]
        rows.append([model, dtype, preset, best["attack"], *size, badge])
    return rows


def _field(report: Report, cells: tuple[JsonObject, ...], model: str, dtype: str) -> None:
    report.section(f"Attacks on {model}, {dtype}")
    report.figure(_errors(cells, model, dtype), "Error of the state that is read against the work done.")
    report.figure(_curves(cells, model, dtype), "Share of attackers caught; dashed: the calibrated count rule.")
    for preset in PRESETS:
        with report.details(f"All attacks against {preset}"):
            rows = tables.attack_rows(cells, model, dtype, preset)
            report.table(tables.ATTACK_COLUMNS, rows, caption="Checked nonces until 99 % are caught, by rule")
    report.table(tables.CLAIM_COLUMNS, tables.claim_rows(cells, model, dtype), caption="Claims without a model")
    report.table(
        tables.AUDIT_COLUMNS, tables.audit_rows(cells, model, dtype), caption="Simulated audits of honest nodes"
    )
    honest = tables.honest_errors(cells, model, dtype)["hardened"]
    searched = tables.search_rows(cells, model, honest)
    if searched:
        report.table(tables.SEARCH_COLUMNS, searched, caption="How many positions must be read: the attacker's best")


def _experts(report: Report, cells: tuple[JsonObject, ...]) -> None:
    for cell in cells:
        if cell.get("kind") == "experts":
            report.section("Skipping experts")
            rows = [
                [r["name"], f"{r['cost']:.2f}", f"{r['artifact']:.3f}", f"{r['hardened']:.3f}"] for r in cell["rows"]
            ]
            report.table(("prover", "cost", "ε, last state", "ε, hardened"), rows)


def _errors(cells: tuple[JsonObject, ...], model: str, dtype: str) -> "Figure":
    fig, ax = figure(height=3.8)
    for color, preset in zip(SERIES, ("artifact", "hardened"), strict=False):
        points = [
            (cell["cost"], cell["presets"][preset]["error_mean"])
            for cell in cells
            if _is_attack(cell, model, dtype)
            and preset in cell["presets"]
            and cell["presets"][preset]["error_mean"] > 0
        ]
        label = "all positions (hardened)" if preset == "hardened" else "last position (published)"
        costs, errors = zip(*points, strict=True)
        ax.scatter(costs, errors, s=18, color=color, label=label)
    honest = tables.honest_errors(cells, model, dtype)["hardened"]
    for multiple in (1, 20):
        ax.axhline(multiple * honest, color=MUTED, linewidth=0.8, linestyle=":")
        ax.annotate(f"{multiple} × honest", (0.0, multiple * honest), color=MUTED, fontsize=8, va="bottom")
    ax.set_yscale("log")
    ax.set_xlabel("work, honest = 1")
    ax.set_ylabel("ε")
    legend(ax)
    return fig


def _curves(cells: tuple[JsonObject, ...], model: str, dtype: str) -> "Figure":
    fig, ax = figure(height=3.6)
    shown = [cell for cell in cells if _is_attack(cell, model, dtype) and cell["name"] in CURVES]
    for color, cell in zip(SERIES, shown, strict=False):
        preset = "poc-2.0" if "poc-2.0" in cell["presets"] else "hardened"
        values: dict[str, Any] = cell["presets"][preset]
        ax.plot(CHECKED, values["sequential"], color=color, label=f"{cell['name']}, {preset}")
        ax.plot(CHECKED, values["counting"], color=color, linestyle="--", linewidth=0.9)
    ax.set_xscale("log")
    ax.set_xlabel("checked nonces")
    ax.set_ylabel("caught")
    legend(ax, loc="lower right")
    return fig


def _is_attack(cell: JsonObject, model: str, dtype: str) -> bool:
    return bool(cell.get("kind") == "attack" and cell["model"] == model and cell["dtype"] == dtype)
