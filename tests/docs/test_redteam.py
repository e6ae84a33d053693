"""The tables of docs/redteam.md are those of the committed runs."""

from pathlib import Path

import pytest

from assay.poc.experiments import read_run
from assay.poc.experiments.redteam import _tables as tables
from assay.poc.experiments.redteam._field import PRESETS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "redteam.md"
RUNS = ROOT / "benchmarks" / "results" / "experiments"


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_the_main_table_is_what_was_measured(name: str):
    cells = read_run(RUNS / f"redteam-{name}", "redteam").cells
    page = PAGE.read_text(encoding="utf-8")
    for model, dtype in tables.fields(cells):
        for preset in PRESETS:
            best = tables.paying(cells, model, dtype, preset)
            row = [model, dtype, preset, best["attack"], f"{best['cost']:.2f}", f"{best['error']:.3f}"]
            row += [f"{best['over_honest']:.1f}", str(best["checked_99"])]
            assert "| " + " | ".join(row) + " |" in page


def test_the_simulated_year_is_what_was_simulated():
    page = PAGE.read_text(encoding="utf-8")
    for cell in read_run(RUNS / "simulate", "simulate").cells:
        rows = {(row["rule"], row["kind"]): row for row in cell["rows"]}
        for rule in ("published", "count", "sequential", "lifetime"):
            convicted, paid = rows[rule, "honest"]["convicted"], rows[rule, "2.0% junk"]["paid"]
            assert f"| `{cell['preset']}` | {rule} | {convicted} |" in page
            assert f"{paid:.1%}" in page
