"""Print the tables of docs/redteam-responses.md, made from committed runs."""

from typing import Any

from assay_research.responses.run import standing_table
from assay_research.runs.runs import read_run
from tables import RUNS, print_table

MODELS = ("qwen3", "llama", "trained-like")


def _cells() -> list[Any]:
    """Return the cells of the red team for responses, of all models."""
    return [cell for name in MODELS for cell in read_run(RUNS / f"responses-{name}", "responses").cells]


def standing() -> None:
    """Print our figures for int4 weights beside those of the best rival."""
    print_table(*standing_table(_cells()))


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
