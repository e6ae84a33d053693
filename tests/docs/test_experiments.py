"""docs/experiments.md says what the committed results say: every row of its tables is made from them again."""

import json
from pathlib import Path

import pytest

from assay.research.matrix import configurations
from assay.research.runs import read_run
from assay.research.weights import weight_rows

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "benchmarks" / "results" / "experiments"
PAGE = ROOT / "docs" / "experiments.md"


def approach_rows(run: str) -> list[str]:
    """Name, then both models' mean, offset, spreads, verdict, separation, AUC and overhead."""
    cells = read_run(RUNS / run, "approaches").cells
    names = dict.fromkeys(cell["approach"] for cell in cells)
    return [_approach(name, [cell for cell in cells if cell["approach"] == name]) for name in names]


def _approach(name: str, cells: list[dict]) -> str:
    columns = (
        [f"{cell['mean']:.4f}" for cell in cells],
        [f"{cell['mean_off_in_standard_errors']:.1f}" for cell in cells],
        [f"{100 * cell['spreads'][0]['spread']:.1f}" for cell in cells],
        [f"{100 * cell['spreads'][1]['spread']:.1f}" for cell in cells],
        [cell["breaks_structure"] for cell in cells],
        [f"{cell['separation']:.0f}" for cell in cells],
        [f"{cell['auc']:.3f}" for cell in cells],
        [f"{round(100 * cell['overhead'])}" for cell in cells],
    )
    return f"| `{name}` | " + " | ".join(" / ".join(column) for column in columns) + " |"


def hook_rows() -> list[str]:
    """Model and its sizes; honest and int4 residual and the AUC with its interval, of sign flips and of hooks."""
    rows = []
    for flips, hooks in hook_cells():
        sides = " | ".join(
            f"{cell['honest_residual']:.5f} | {cell['int4_residual']:.4f} | {cell['auc']:.3f} "
            "({:.3f} to {:.3f})".format(*cell["auc_interval"])
            for cell in (flips, hooks)
        )
        rows.append(f"| `{flips['model']}` | {flips['num_layers']} | {flips['hidden_size']} | {sides} |")
    return rows


def hook_cells() -> list[tuple[dict, dict]]:
    """Sign flips and hooks with normalisation, of every model that was measured on the GPU, by width."""
    cells = [cell for run in ("h200", "h200-deep") for cell in read_run(RUNS / run, "approaches").cells]
    found = {(cell["model"], cell["approach"]): cell for cell in cells}
    models = sorted(dict.fromkeys(cell["model"] for cell in cells), key=lambda m: found[m, "poc-2.0"]["hidden_size"])
    return [(found[model, "poc-2.0"], found[model, "layer-normalize"]) for model in models]


def matrix_rows(run: str) -> list[str]:
    """Model and mode, the rate of every block, spread, band, p, verdict, throughput."""
    rows = []
    for found in configurations(read_run(RUNS / run, "matrix").cells):
        spread = found.spread
        if spread is None:
            continue
        blocks = " | ".join(f"{100 * block.rate:.1f}" for block in found.blocks)
        band = f"{100 * spread.low:.1f} to {100 * spread.high:.1f}"
        rows.append(
            f"| {found.model.partition(':')[2]}, {found.mode} | {blocks} | {100 * spread.value:.1f} | "
            f"{band} | {spread.p_text} | {found.nonces_per_second:.0f} |"
        )
    return rows


def throughput_rows(run: str) -> list[str]:
    """Model, nonces and rate of the shapes."""
    return [
        f"| `{found.model}` | {found.checked} | {found.nonces_per_second:.0f} |"
        for found in configurations(read_run(RUNS / run, "matrix").cells)
        if found.spread is None
    ]


def weights_rows(run: str) -> list[str]:
    """Model and weights, block means, spread, band, verdict."""
    return [
        f"| {row.model.partition(':')[2]}, {row.weights} | " + " | ".join(f"{mean:.4f}" for mean in row.means)
        + f" | {row.spread:.4f} | {row.low:.4f} to {row.high:.4f} | {'inside' if row.inside else 'beyond'} "
        + f"| {row.context_effect:.2g} |"
        for row in weight_rows(read_run(RUNS / run, "weights").cells)
    ]  # fmt: skip


def target_rows() -> list[str]:
    """Pipeline and rate, closed form, both models' measured value and offset."""
    rows = json.loads((ROOT / "benchmarks/results/r_target_h200.json").read_text())["rows"]
    pairs = dict.fromkeys((row["pipeline"], row["valid_rate"]) for row in rows)
    lines = []
    for pipeline, rate in pairs:
        both = [row for row in rows if (row["pipeline"], row["valid_rate"]) == (pipeline, rate)]
        measured = " / ".join(f"{row['measured']:.4f}" for row in both)
        off = " / ".join(f"{row['off_in_standard_errors']:+.1f}".replace("-", "−") for row in both)
        lines.append(f"| {pipeline} | {100 * rate:.4g} | {both[0]['r_target']:.4f} | {measured} | {off} |")
    return lines


@pytest.mark.parametrize(
    "rows",
    [
        approach_rows("h200"),
        approach_rows("h200-shapes"),
        hook_rows(),
        matrix_rows("h200"),
        throughput_rows("h200"),
        weights_rows("cpu"),
        weights_rows("h200"),
        target_rows(),
    ],
    ids=["approaches", "shapes", "hooks", "matrix", "throughput", "weights", "weights-h200", "r_target"],
)
def test_the_tables_are_those_of_the_results(rows: list[str]):
    page = PAGE.read_text(encoding="utf-8")
    assert rows
    missing = [row for row in rows if row not in page]
    assert not missing, "\n".join(missing)


def test_the_claims_of_the_page_hold():
    """What the text concludes, computed from the results."""
    page = PAGE.read_text(encoding="utf-8")
    found = {(c.model.partition(":")[2], c.mode): c for c in configurations(read_run(RUNS / "h200", "matrix").cells)}
    for model in ("qwen3", "llama"):
        spread = found[model, "sign-flips"].spread
        assert spread.inside
        assert spread.value < 0.02
        assert found[model, "layer-hooks"].spread.value > 0.05
    alone = [f"{100 * found[model, 'sign-flips'].spread.nonces_high:.2f}" for model in ("qwen3", "llama")]
    assert f"A band of the nonces alone ends at {' and '.join(alone)};" in page
    assert sum(c.undelivered for c in found.values()) == 0
    assert sum(len(block.rates) for c in found.values() for block in c.blocks) == 38
    baseline = [c for c in read_run(RUNS / "h200", "approaches").cells if c["approach"] == "permutation"]
    assert all(c["spreads"][0]["spread"] > 10 * c["spreads"][0]["noise_band"][1] for c in baseline)
    for flips, hooks in hook_cells():  # hooks with normalisation hurt separability on the wide models, not on the small
        assert (hooks["auc_interval"][1] < flips["auc_interval"][0]) == (flips["hidden_size"] > 256)
    low, high = hook_cells()[-1][1]["auc_interval"]
    assert low < 0.5 < high
    targets = json.loads((ROOT / "benchmarks/results/r_target_h200.json").read_text())
    assert targets["largest_offset_in_standard_errors"] < 2.5
