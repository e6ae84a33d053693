"""The v_hack half of the demonstration: hack directions of generated pairs, tested on groups held out."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from assay.models import Model
    from assay.reports import Cell, Report
    from assay.vhack.checks import Check, CheckReport

__all__ = ["COLUMNS", "draw", "rows", "run_checks", "summary"]

Progress = Callable[[int, int], None]

PAIRS = 16
COLUMNS = ("check", "value", "95 % interval", "null", "verdict")


def run_checks(model: "Model", progress: Progress | None) -> "CheckReport":
    """Extract gradients of generated pairs and run the checks, whole task groups held out."""
    from assay.vhack import pair_gradients
    from assay.vhack.checks import check_gradients
    from assay.vhack.pairs import generate_pairs

    return check_gradients(pair_gradients(generate_pairs(PAIRS), model, progress=progress))


def rows(report: "CheckReport") -> list[list[str]]:
    """Return the cells of :data:`COLUMNS` for every check."""
    return [
        [
            check.title,
            f"{check.measured.value:.3f}" if check.measured else "",
            f"{check.measured.low:.3f} to {check.measured.high:.3f}" if check.measured else "",
            _null(check),
            check.verdict,
        ]
        for check in report.checks
    ]


def summary(report: "CheckReport") -> list[dict[str, object]]:
    """Return JSON-ready values for every check."""
    return [
        {"name": check.name, "verdict": check.verdict, "value": check.measured.value if check.measured else None}
        for check in report.checks
    ]


def draw(report: "Report", model: "Model", checked: "CheckReport") -> None:
    """Add the checks as a table."""
    from assay.reports import Badge

    report.section("v_hack: do the hack directions hold on tasks they were not made from?")
    report.paragraph(
        f"{PAIRS} generated pairs, same prompt and same correct solution; one side cheats its test, the other does "
        "not. "
        f"Gradients of {model.reference} were taken in the singular basis of every weight matrix. Directions come "
        "from some task groups and are scored on the others."
    )
    cells: list[list[Cell]] = [[*row[:-1], Badge(row[-1], row[-1])] for row in rows(checked)]  # type: ignore[arg-type]
    report.table(COLUMNS, cells)
    report.paragraph(
        "So few pairs are a demonstration, not evidence: `assay vhack check` with more pairs gives the full report, "
        "rules, nulls and intervals included."
    )


def _null(check: "Check") -> str:
    """The worst p-value against any null."""
    return f"p ≤ {max(check.p_values.values()):.3f}" if check.p_values else ""
