"""The rows of the experiment's tables, for the terminal, the page and the documentation."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from assay.reports import Cell, JsonObject

__all__ = [
    "ATTACK_COLUMNS",
    "CLAIM_COLUMNS",
    "attack_rows",
    "audit_rows",
    "claim_rows",
    "honest_errors",
    "markdown",
    "paying",
    "search_rows",
]

ATTACK_COLUMNS = ("attack", "cost", "ε", "over honest", "residual", "AUC", "sequential", "count")
CLAIM_COLUMNS = ("claim", "preset", "work per nonce", "sequential", "count")
AUDIT_COLUMNS = ("prover", "preset", "audits", "accused by the sequential test", "by the published constants")
SEARCH_COLUMNS = ("positions read", "cheapest strategy", "cost", "ε", "over honest")

SAVED = 0.25
HONEST_MULTIPLE = 20.0  # the hardened preset aims at an error this much above the honest noise

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
    """Return the rows of :data:`SEARCH_COLUMNS`: for each number of positions read, the strategy of the least error.

    Args:
        cells: Cells of the run.
        model: Reference of the model whose rows are wanted.
        honest: mean ε of an honest prover.
    """
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


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Return a table for the documentation."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
