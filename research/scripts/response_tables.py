"""Print the tables of docs/redteam-responses.md, made from committed runs."""

from typing import Any

from assay_research.responses.tables import alarm_table, honest_table, standing_table
from assay_research.runs.runs import read_run
from tables import RUNS, print_table

MODELS = ("qwen3", "llama", "trained-like")


def _cells() -> list[Any]:
    """Return the cells of the red team for responses, of all models."""
    return [cell for name in MODELS for cell in read_run(RUNS / f"responses-{name}", "responses").cells]


def progress() -> None:
    """Print how many cells of every run are measured, and whether the run reached its end."""
    rows = []
    for name in MODELS:
        run = read_run(RUNS / f"responses-{name}", "responses")
        settings = [run.settings[key] for key in ("honest", "responses", "seq_len")]
        rows.append((f"[responses-{name}](../research/results/experiments/responses-{name})", *settings,
                     len(run.cells), "yes" if run.complete else "no"))  # fmt: skip
    print_table(("run", "honest responses", "responses of a cheat", "tokens of each", "cells", "complete"), rows)


def standing() -> None:
    """Print our figures for int4 weights beside those of the best rival."""
    print_table(*standing_table(_cells()))


def honest() -> None:
    """Print what honest provers show, and how many of their audits are accused."""
    print_table(*honest_table(_cells()))


def alarms() -> None:
    """Print the false alarms of thresholds that come from other honest responses, with sampled tokens."""
    columns, rows = alarm_table(_cells())
    print_table((columns[0], *columns[2:]), [(row[0], *row[2:]) for row in rows if row[1] == "sampled"])


def caught(figure: str, *methods: str, mode: str = "sampled") -> None:
    """Print the tokens until every cheat is caught, all models side by side; a dash where none was measured.

    Args:
        figure: Name of the figure, ``sequential_99`` or ``threshold_99``.
        methods: Names of the methods, one for each column.
        mode: Whether tokens are sampled or greedy.
    """
    cells = [cell for cell in _cells() if cell["kind"] == "cheat" and cell["mode"] == mode]
    found = {(cell["model"].rpartition(":")[2], cell["name"]): cell["methods"] for cell in cells}
    rows = []
    for cheat in dict.fromkeys(name for _, name in found):
        row = [cheat]
        for method in methods:
            values = [found[model, cheat][method][figure] if (model, cheat) in found else "–" for model in MODELS]
            row.append(" / ".join("never" if value is None else str(value) for value in values))
        rows.append(row)
    print_table(("cheat", *methods), rows)
