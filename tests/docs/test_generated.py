"""Tables of the documentation are those of the results, and what the pages conclude follows from these."""

import subprocess
import sys
from pathlib import Path

import pytest

from assay.reports import read_json

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import tables  # noqa: E402

PAGES = [path for path in sorted((ROOT / "docs").rglob("*.md")) if "[[[cog" in path.read_text(encoding="utf-8")]


def test_pages_have_generated_tables():
    assert {"experiments.md", "redteam.md", "statistics.md"} <= {path.name for path in PAGES}


def test_generated_tables_are_those_of_the_results():
    """``make docs`` writes them."""
    command = [sys.executable, "-m", "cogapp", "-P", "-I", str(ROOT / "scripts"), "--check", *map(str, PAGES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_sign_flips_are_inside_their_band_and_hooks_are_not():
    cells = tables.read_run(tables.RUNS / "h200", "matrix").cells
    found = {(c.model.partition(":")[2], c.mode): c for c in tables.configurations(cells)}
    for model in ("qwen3", "llama"):
        spread = found[model, "sign-flips"].spread
        assert spread.inside
        assert spread.value < 0.02
        assert found[model, "layer-hooks"].spread.value > 0.05
    assert sum(c.undelivered for c in found.values()) == 0
    assert sum(len(block.rates) for c in found.values() for block in c.blocks) == 38


def test_the_baseline_is_far_outside_its_noise_band():
    cells = tables.read_run(tables.RUNS / "h200", "approaches").cells
    baseline = [cell for cell in cells if cell["approach"] == "permutation"]
    assert baseline
    assert all(cell["spreads"][0]["spread"] > 10 * cell["spreads"][0]["noise_band"][1] for cell in baseline)


def test_hooks_hurt_separability_on_wide_models_only():
    for flips, hooks in tables.hook_cells():
        assert (hooks["auc_interval"][1] < flips["auc_interval"][0]) == (flips["hidden_size"] > 256)
    low, high = tables.hook_cells()[-1][1]["auc_interval"]
    assert low < 0.5 < high


def test_r_targets_are_within_sampling_error():
    assert read_json(tables.RESULTS / "r_target_h200.json")["largest_offset_in_standard_errors"] < 2.5


@pytest.mark.parametrize("rows", [tables.heavy_tails(), tables.unseen_tails()], ids=["bundled", "unseen"])
def test_honest_nodes_are_accused_at_most_once_in_a_thousand_audits(rows: list[dict]):
    assert max(row[law]["accused"] for row in rows for law in tables.LAWS) <= 1e-3
    assert all(row["default"]["accused"] == 0 for row in rows)


def test_attacks_on_hardened_in_float16_stay_twenty_times_the_honest_noise_away():
    for name in tables.REDTEAM:
        cells = tables.redteam_cells(f"{name}-float16")
        for model, dtype in tables.fields(cells):
            assert tables.paying(cells, model, dtype, "hardened")["over_honest"] > 20


def test_one_e_value_per_node_and_year_accuses_at_most_one_honest_node_in_a_thousand():
    for cell in tables.read_run(tables.RUNS / "simulate", "simulate").cells:
        rows = {(row["rule"], row["kind"]): row for row in cell["rows"]}
        assert rows["lifetime", "honest"]["convicted"] <= 9100 / 1000
