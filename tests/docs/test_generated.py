"""Tables of the documentation are those of the results, and what the pages conclude follows from these."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from assay.files.jsonl import read_json

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "research" / "scripts")]

import tables  # noqa: E402

PAGES = [path for path in sorted((ROOT / "docs").rglob("*.md")) if "[[[cog" in path.read_text(encoding="utf-8")]


def test_pages_have_generated_tables():
    assert {"experiments.md", "redteam.md", "statistics.md"} <= {path.name for path in PAGES}


def test_generated_tables_are_those_of_the_results():
    """``make docs`` writes them."""
    command = [
        sys.executable,
        "-m",
        "cogapp",
        "-P",
        "-I",
        "scripts",
        "-I",
        "research/scripts",
        "--check",
        *map(str, PAGES),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_sign_flips_are_inside_their_band_and_hooks_are_not():
    found = {(c.model.partition(":")[2], c.mode): c for c in tables.matrix_configurations("h200")}
    for model in ("qwen3", "llama"):
        spread = found[model, "sign-flips"].spread
        assert spread.inside
        assert spread.value < 0.02
        assert found[model, "layer-hooks"].spread.value > 0.05
        assert found[model, "layer-hooks"].spread.p_value < 1e-6
        assert found[model, "sign-flips"].width < 30  # of 256: the effective dimension that the same run measured
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


def test_r_targets_hold_over_blocks_and_not_by_the_nonces_of_one():
    assert read_json(tables.RESULTS / "r_target_h200.json")["largest_offset_in_standard_errors"] < 2.5
    figures = read_json(tables.RESULTS / "r_target.json")
    assert figures["largest_offset_in_standard_errors"] < 2.5
    assert figures["inside_the_interval"] == 1.0
    blocks = figures["blocks"]
    inside = [row["blocks_inside"] for row in figures["rows"] if "blocks_inside" in row]
    assert all(min(counts["assumed"], counts["with_factors"]) >= 0.9 * blocks for counts in inside)
    assert sum(counts["nonces_alone"] for counts in inside) < 0.85 * blocks * len(inside)


def test_widths_follow_the_law_of_their_block_and_not_the_chord_law():
    rows = read_json(tables.RESULTS / "chord_law_blocks.json")["poc-2.0"]
    assert len({row["block"] for row in rows}) == 24
    of_block = [row["width_off_the_block_in_standard_errors"] for row in rows]
    assert np.std([row["width_off_in_standard_errors"] for row in rows]) > 3 > 1.2 > np.std(of_block)


def test_noise_of_distances_follows_the_length_of_the_head():
    """What divides noise by blocks: its length, and not the width of the distances."""
    for figures in read_json(tables.RESULTS / "block_scale.json")["models"].values():
        for dtype in ("bfloat16", "float16"):
            found = figures[dtype]["common"]
            left = {name: row["sd_left"] for name, row in found["predictors"].items()}
            assert left["length"] < 1.2 * found["sd_of_sampling"] < 0.7 * found["sd_between_blocks"]
            assert left["states"] > found["sd_between_blocks"]


def test_laws_of_one_block_accuse_at_most_one_honest_audit_in_a_thousand_in_other_blocks():
    rows = read_json(tables.RESULTS / "shares.json")["rows"]
    assert len(rows) == 4 * 3 * 2 * 2, "four models, three presets, two formats, two sizes of the law"
    assert max(row["accused"] for row in rows) <= 1e-3
    assert max(cheat["honest_at_64"] for row in rows for cheat in row["cheats"]) <= 0.01


def test_hardened_catches_a_tenth_that_is_computed_cheaply():
    rows = [row for row in read_json(tables.RESULTS / "shares.json")["rows"] if row["preset"] == "hardened"]
    (tenth,) = {row["cheats"][0]["share"] for row in rows}
    assert tenth == 0.1
    assert min(row["cheats"][0]["caught"] for row in rows if row["law_from"] == 1024) >= 0.99
    assert min(row["cheats"][0]["caught"] for row in rows if row["law_from"] == 256) >= 0.975


def test_attacks_on_hardened_in_float16_stay_twenty_times_the_honest_noise_away():
    for name in tables.REDTEAM:
        cells = tables.redteam_cells(f"{name}-float16")
        for model, dtype in tables.fields(cells):
            assert tables.paying(cells, model, dtype, "hardened")["over_honest"] > 20


def test_one_e_value_per_node_and_year_accuses_at_most_one_honest_node_in_a_thousand():
    for cell in tables.read_run(tables.RUNS / "simulate", "simulate").cells:
        rows = {(row["rule"], row["kind"]): row for row in cell["rows"]}
        assert rows["lifetime", "honest"]["convicted"] <= 9100 / 1000
