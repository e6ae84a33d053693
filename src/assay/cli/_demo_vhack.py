"""The v_hack half of the demonstration: hack directions of generated pairs, tested on groups held out."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from assay.cli._vhack_check import check_table

if TYPE_CHECKING:
    from assay.models import Model
    from assay.reports import Cell, Report
    from assay.vhack.checks import CheckReport

Progress = Callable[[int, int], None]

PAIRS = 40  # the least for which lda passes every check on the bundled models


def run_checks(model: "Model", progress: Progress | None) -> "CheckReport":
    """Extract gradients of generated pairs and run the checks, whole task groups held out."""
    from assay.vhack import pair_gradients
    from assay.vhack.checks import CheckSettings, check_gradients
    from assay.vhack.pairs import generate_pairs

    gradients = pair_gradients(generate_pairs(PAIRS), model, progress=progress)
    return check_gradients(gradients, settings=CheckSettings(method="lda"))


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
    columns, rows = check_table(checked)
    cells: list[list[Cell]] = [[*row[:-1], Badge(row[-1], row[-1])] for row in rows]  # type: ignore[arg-type]
    report.table(columns, cells)
    report.paragraph(
        "The pairs are generated and the tasks are small, so this is a demonstration. `assay vhack check` tests "
        "pairs of your own and gives the full report, with rules, nulls and intervals."
    )
