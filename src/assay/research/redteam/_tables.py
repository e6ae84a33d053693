"""The rows of the experiment's tables, for the terminal and the documentation, and the page of a run."""

from collections.abc import Iterable, Iterator
from typing import Any

from assay.reports import MUTED, SERIES, Badge, Cell, JsonObject, Report, figure, legend
from assay.research.redteam._field import CHECKED, PRESETS
from assay.research.runs import RunRecords

ATTACK_COLUMNS = ("attack", "cost", "ε", "over honest", "residual", "AUC", "sequential", "count")
CLAIM_COLUMNS = ("claim", "preset", "work per nonce", "sequential", "count")
AUDIT_COLUMNS = ("prover", "preset", "audits", "accused by the sequential test", "by the published constants")
SEARCH_COLUMNS = ("positions read", "cheapest strategy", "cost", "ε", "over honest")

SAVED = 0.25

Cells = Iterable[JsonObject]


def _of(cells: Cells, kind: str, **wanted: str) -> Iterator[JsonObject]:
    for cell in cells:
        if cell.get("kind") == kind and all(cell[name] == value for name, value in wanted.items()):
            yield cell


def fields(cells: Cells) -> list[tuple[str, str]]:
    """Return the models and dtypes that were measured."""
    return [(cell["model"], cell["dtype"]) for cell in _of(cells, "honest")]


def honest_errors(cells: Cells, model: str, dtype: str) -> dict[str, float]:
    """Return the mean ε of honest provers by preset."""
    cell = next(_of(cells, "honest", model=model, dtype=dtype))
    return {preset: values["error_mean"] for preset, values in cell["presets"].items()}


def attack_rows(cells: Cells, model: str, dtype: str, preset: str) -> list[list[Cell]]:
    """Return the rows of :data:`ATTACK_COLUMNS`: checked nonces until 99 % are caught, at 1e-3 false accusations."""
    honest = honest_errors(cells, model, dtype)[preset]
    rows: list[list[Cell]] = []
    for cell in _of(cells, "attack", model=model, dtype=dtype):
        if preset not in cell["presets"]:
            continue
        values = cell["presets"][preset]
        rows.append(
            [
                cell["name"],
                f"{cell['cost']:.2f}",
                f"{values['error_mean']:.3f}",
                f"{values['error_mean'] / honest:.1f}",
                f"{values['residual_rms']:.2g}",
                f"{values['auc']:.3f}",
                _needs(values["sequential_99"]),
                _needs(values["counting_99"]),
            ]
        )
    return rows


def _needs(nonces: int | None) -> Cell:
    return nonces if nonces is not None else "never"


def claim_rows(cells: Cells, model: str, dtype: str) -> list[list[Cell]]:
    """Return the rows of :data:`CLAIM_COLUMNS`."""
    return [
        [row["claim"], row["preset"], f"{row['cost']:.2f}", _needs(row["sequential_99"]), _needs(row["counting_99"])]
        for cell in _of(cells, "claims", model=model, dtype=dtype)
        for row in cell["rows"]
    ]


def audit_rows(cells: Cells, model: str, dtype: str) -> list[list[Cell]]:
    """Return the rows of :data:`AUDIT_COLUMNS`."""
    return [
        [engine, preset, row["audits"], f"{row['accused']:.2%}", f"{row['published_rule']:.1%}"]
        for cell in _of(cells, "audits", model=model, dtype=dtype)
        for engine, presets in cell["engines"].items()
        for preset, row in presets.items()
    ]


def search_rows(cells: Cells, model: str, honest: float) -> list[list[Cell]]:
    """Return the rows of :data:`SEARCH_COLUMNS`: for each number of positions read, the strategy of the least error."""
    rows: list[list[Cell]] = []
    for cell in _of(cells, "search", model=model):
        for count in sorted({row["positions"] for row in cell["rows"]}):
            saving = [row for row in cell["rows"] if row["positions"] == count and _saves(row)]
            best = min(saving, key=lambda row: float(row["error_mean"]))
            error = best["error_mean"]
            rows.append([count, best["strategy"], f"{best['cost']:.2f}", f"{error:.3f}", f"{error / honest:.1f}"])
    return rows


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
    """Whether a quarter of the work is saved, to the hundredth that tables show."""
    return bool(round(row["cost"], 2) <= 1 - SAVED)


CURVES = ("int8 weights", "int4 weights", "first 25.0% dropped", "first 50.0% dropped", "last 25.0% dropped")
REFERENCE = "bfloat16"


def draw(report: Report, run: RunRecords) -> None:
    """Add which attack pays, error against cost, curves of detection, and all"""
    measured = fields(run.cells)
    if not measured:
        return
    report.section("Red team: which attack pays?")
    report.paragraph(
        "Among attacks that save a quarter of the work by skipping, the one with the smallest error ε of the unit "
        "state that is read. 'Caught' is after how many checked nonces the sequential test accuses the hardest of them "
        "with 99 %, at one false accusation in a thousand."
    )
    report.table(
        ("model", "dtype", "preset", "cheapest error", "cost", "ε", "over honest", "caught"),
        [row for model, dtype in measured for row in _paying(run.cells, model, dtype)],
    )
    for model, dtype in measured:
        _field(report, run.cells, model, dtype)
    _experts(report, run.cells)


def _paying(cells: Cells, model: str, dtype: str) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    for preset in PRESETS:
        best = paying(cells, model, dtype, preset)
        caught = best["checked_99"]
        badge = Badge(f"{caught} nonces" if caught else "never", "pass" if caught and caught <= 20 else "fail")
        size = [f"{best['cost']:.2f}", f"{best['error']:.3f}", f"{best['over_honest']:.1f}"]
        rows.append([model, dtype, preset, best["attack"], *size, badge])
    return rows


def _field(report: Report, cells: Cells, model: str, dtype: str) -> None:
    report.section(f"Attacks on {model}, {dtype}")
    _errors(report, cells, model, dtype)
    _curves(report, cells, model, dtype)
    for preset in PRESETS:
        with report.details(f"All attacks against {preset}"):
            rows = attack_rows(cells, model, dtype, preset)
            report.table(ATTACK_COLUMNS, rows, caption="Checked nonces until 99 % are caught, by rule")
    report.table(CLAIM_COLUMNS, claim_rows(cells, model, dtype), caption="Claims without a model")
    report.table(AUDIT_COLUMNS, audit_rows(cells, model, dtype), caption="Simulated audits of honest nodes")
    honest = honest_errors(cells, model, dtype)["hardened"]
    searched = search_rows(cells, model, honest)
    if searched:
        report.table(SEARCH_COLUMNS, searched, caption="How many positions must be read: the attacker's best")


def _experts(report: Report, cells: Cells) -> None:
    for cell in _of(cells, "experts"):
        report.section("Skipping experts")
        rows = [[r["name"], f"{r['cost']:.2f}", f"{r['artifact']:.3f}", f"{r['hardened']:.3f}"] for r in cell["rows"]]
        report.table(("prover", "cost", "ε, last state", "ε, hardened"), rows)


def _errors(report: Report, cells: Cells, model: str, dtype: str) -> None:
    fig, ax = figure(height=3.8)
    for color, preset in zip(SERIES, ("artifact", "hardened"), strict=False):
        points = [
            (cell["cost"], cell["presets"][preset]["error_mean"])
            for cell in _of(cells, "attack", model=model, dtype=dtype)
            if preset in cell["presets"] and cell["presets"][preset]["error_mean"] > 0
        ]
        label = "all positions (hardened)" if preset == "hardened" else "last position (published)"
        costs, errors = zip(*points, strict=True)
        ax.scatter(costs, errors, s=18, color=color, label=label)
    honest = honest_errors(cells, model, dtype)["hardened"]
    for multiple in (1, 20):
        ax.axhline(multiple * honest, color=MUTED, linewidth=0.8, linestyle=":")
        ax.annotate(f"{multiple} × honest", (0.0, multiple * honest), color=MUTED, fontsize=8, va="bottom")
    ax.set_yscale("log")
    ax.set_xlabel("work, honest = 1")
    ax.set_ylabel("ε")
    legend(ax)
    report.figure(fig, "Error of the state that is read against the work done.")


def _curves(report: Report, cells: Cells, model: str, dtype: str) -> None:
    fig, ax = figure(height=3.6)
    shown = [cell for cell in _of(cells, "attack", model=model, dtype=dtype) if cell["name"] in CURVES]
    for color, cell in zip(SERIES, shown, strict=False):
        preset = "poc-2.0" if "poc-2.0" in cell["presets"] else "hardened"
        values: dict[str, Any] = cell["presets"][preset]
        ax.plot(CHECKED, values["sequential"], color=color, label=f"{cell['name']}, {preset}")
        ax.plot(CHECKED, values["counting"], color=color, linestyle="--", linewidth=0.9)
    ax.set_xscale("log")
    ax.set_xlabel("checked nonces")
    ax.set_ylabel("caught")
    legend(ax, loc="lower right")
    report.figure(fig, "Share of attackers caught; dashed: the calibrated count rule.")
