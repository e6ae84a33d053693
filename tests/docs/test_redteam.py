"""The tables of docs/redteam.md are those of the committed runs."""

from pathlib import Path

import pytest

from assay.reports import read_json
from assay.research.redteam import _tables as tables
from assay.research.redteam._field import PRESETS
from assay.research.runs import read_run

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "redteam.md"
RESULTS = ROOT / "benchmarks" / "results"
RUNS = RESULTS / "experiments"


@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen3-float16", "llama-float16"])
def test_the_main_table_is_what_was_measured(name: str):
    cells = read_run(RUNS / f"redteam-{name}", "redteam").cells
    page = PAGE.read_text(encoding="utf-8")
    for model, dtype in tables.fields(cells):
        for preset in PRESETS:
            best = tables.paying(cells, model, dtype, preset)
            row = [model, dtype, preset, best["attack"], f"{best['cost']:.2f}", f"{best['error']:.3f}"]
            row += [f"{best['over_honest']:.1f}", str(best["checked_99"])]
            assert "| " + " | ".join(row) + " |" in page


@pytest.mark.parametrize("path", ["redteam.md", "decisions/hardened-float16.md"])
def test_float16_stands_beside_bfloat16_as_measured(path: str):
    page = (ROOT / "docs" / path).read_text(encoding="utf-8")
    honest, best, int8, junk, experts = ([] for _ in range(5))
    for kind, dtype in (("", "bfloat16"), ("-float16", "float16")):
        runs = [read_run(RUNS / f"redteam-{name}{kind}", "redteam").cells for name in ("qwen3", "llama")]
        where = [(cells, *tables.fields(cells)[0]) for cells in runs]
        errors = [tables.honest_errors(*place)["hardened"] for place in where]
        honest.append(" / ".join(f"{error:.{3 if dtype == 'bfloat16' else 4}f}" for error in errors))
        best.append(" / ".join(f"{tables.paying(*place, 'hardened')['over_honest']:.1f}" for place in where))
        rows = [{row[0]: row for row in tables.attack_rows(*place, "hardened")} for place in where]
        int8.append(" / ".join(str(found["int8 weights"][3]) for found in rows))
        claims = [row for cells in runs for cell in cells if cell["kind"] == "claims" for row in cell["rows"]]
        caught = [r["sequential"][-1] for r in claims if (r["claim"], r["preset"]) == ("2% invented", "poc-2.0")]
        junk.append(" / ".join(f"{share:.4g}" for share in caught))
        measured = read_json(RESULTS / f"hardened_experts{kind.replace('-', '_')}.json")
        experts.append(" / ".join(f"{measured[name]['ratio']:.1f}" for name in ("random", "trained")))
    for row in (honest, best, int8, junk, experts):
        assert f"| {row[0]} | {row[1]} |" in page, row


def test_the_simulated_year_is_what_was_simulated():
    page = PAGE.read_text(encoding="utf-8")
    published = page.partition("The published constants are not usable")[2].partition("\n")[0]
    for cell in read_run(RUNS / "simulate", "simulate").cells:
        rows = {(row["rule"], row["kind"]): row for row in cell["rows"]}
        for rule in ("count", "sequential", "lifetime"):
            shown = ("int8 weights", "0.5% junk", "1.0% junk", "2.0% junk")
            values = [rows[rule, "honest"]["convicted"], *(f"{rows[rule, kind]['paid']:.1%}" for kind in shown)]
            row = f"| {cell['dtype']} | `{cell['preset']}` | {rule} | {' | '.join(map(str, values))} |"
            assert row in page
        assert f" {rows['published', 'honest']['convicted']}" in published


def test_what_hardened_costs_with_compiled_kernels_is_what_was_measured():
    pages = [PAGE, ROOT / "docs" / "decisions" / "hardened-float16.md", RESULTS / "LEADERBOARD.md"]
    page, decision, leaderboard = (path.read_text(encoding="utf-8") for path in pages)
    same, across = {}, {}
    for shape, layers in (("qwen3-0.6b", 28), ("llama-3.2-1b", 16), ("llama-3.1-8b", 32)):
        name = f"hardened_throughput_h200_{shape}.json"
        bfloat16, float16 = read_json(RESULTS / name)["cases"]
        ratios = [f"{case['hardened_over_poc']:.3f}" for case in (bfloat16, float16)]
        cells = " | ".join(f"**{ratio}**" if float(ratio) < 0.95 else ratio for ratio in ratios)
        assert f"(../benchmarks/results/{name}) | shape:{shape}, {layers} layers | {cells} |" in page
        same[layers], across[layers] = ratios[0], f"{float16['hardened_over_first_dtype']['poc-2.0']['middle']:.3f}"
    assert f"| {same[28]} / {same[16]} / {same[32]} | {across[28]} / {across[16]} / {across[32]} |" in decision
    assert f"| {same[28]}, {same[32]} and {same[16]} × |" in leaderboard
    assert f"| {across[28]}, {across[32]} and {across[16]} × |" in leaderboard
    assert f"{across[28]}, {across[16]} and {across[32]} times as fast as `poc-2.0` in bfloat16" in page
