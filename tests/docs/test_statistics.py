"""The figures of docs/statistics.md are those of the committed measurement."""

from pathlib import Path

import pytest

from assay.reports import read_json

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
ROWS = read_json(ROOT / "benchmarks" / "results" / "heavy_tails.json")["rows"]


def test_honest_nodes_are_accused_as_rarely_as_the_page_says():
    fitted = [row[size]["accused"] for row in ROWS for size in ("30", "64", "192", "1024", "4096")]
    assert f"at most {100 * max(fitted):.2f} % of audits" in PAGE
    assert max(fitted) <= 1e-3
    assert all(row["default"]["accused"] == 0 for row in ROWS)


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
