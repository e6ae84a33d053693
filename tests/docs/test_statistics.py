"""The figures of docs/statistics.md are those of the committed measurement."""

from pathlib import Path

import pytest

from assay.reports import read_json

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
ROWS = read_json(RESULTS / "heavy_tails.json")["rows"]
OTHERS = [
    row for shape in ("qwen3-0.6b", "llama-3.2-1b") for row in read_json(RESULTS / f"heavy_tails_{shape}.json")["rows"]
]


@pytest.mark.parametrize(
    ("rows", "said"),
    [(ROWS, "at most {} % of audits"), (OTHERS, "fitted laws accuse at most {} %")],
    ids=["all", "held out"],
)
def test_honest_nodes_are_accused_as_rarely_as_the_page_says(rows: list[dict], said: str):
    most = max(row[size]["accused"] for row in rows for size in ("30", "64", "192", "1024", "4096"))
    assert most <= 1e-3
    assert said.format(f"{100 * most:.2f}") in PAGE
    assert all(row["default"]["accused"] == 0 for row in rows)


def test_junk_in_models_that_the_fit_was_not_made_with():
    caught = {True: [], False: []}
    for row in OTHERS:
        wide = (row["preset"], row["dtype"]) == ("poc-2.0", "bfloat16")
        caught[wide] += [row[size]["junk_caught"] for size in ("192", "1024", "4096")]
    assert f"catch junk with {min(caught[False]):.3f} and more" in PAGE
    assert f"in bfloat16, {min(caught[True]):.3f} to {max(caught[True]):.3f}" in PAGE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model", ["Qwen3", "Llama"])
def test_junk_is_caught_as_often_as_the_page_says(model: str, dtype: str):
    line = f"| {model}, {dtype} |"
    for row in ROWS:
        if row["model"] == f"reference:{model.lower()}" and row["dtype"] == dtype:
            caught = [row[size]["junk_caught"] for size in ("192", "1024", "default")]
            line += " " + "; ".join(f"{share + 1e-9:.3f}" for share in caught) + " |"
    assert line.count("|") == 5
    assert line in PAGE
