"""Weight modes: cells, resumption, and the law of the spread of means."""

import numpy as np
import pytest
from assay_research.approaches import WeightPlan, weight_rows
from assay_research.runs.report import build_report
from assay_research.runs.runs import read_run


def plan(checkpoint, **changes) -> WeightPlan:
    values = {
        "models": (str(checkpoint),),
        "nonces": 64,
        "seq_len": 8,
        "dtype": "float32",
        "device": "cpu",
    }
    return WeightPlan(**values | changes)


def test_three_modes_by_blocks(small_checkpoint, tmp_path):
    plan(small_checkpoint, blocks=("a", "b")).measure(tmp_path)
    cells = read_run(tmp_path, "weights").cells
    assert len(cells) == 6
    rows = weight_rows(cells)
    assert [row["weights"] for row in rows] == ["trained", "random-all", "random-embed"]
    assert all(row["blocks"] == ["a", "b"] for row in rows)
    assert len({cell["mean"] for cell in cells}) == 6, "every cell has weights of its own"
    assert all(0 <= row["context_effect"] < 2 for row in rows)
    assert rows[1]["context_effect"] < 1e-2, (
        "weights of 0.02 leave the layers almost without effect"
    )
    plan(small_checkpoint, blocks=("a", "b", "c")).measure(tmp_path)
    assert len(read_run(tmp_path, "weights").cells) == 9
    assert "Does training give distances" in build_report(tmp_path).read_text()


def cell(mean: float, block: str) -> dict:
    return {
        "model": "m",
        "weights": "trained",
        "block_hash": block,
        "nonces": 400,
        "mean": mean,
        "std": 0.02,
        "context_effect": 0.5,
    }


def test_means_that_differ_by_chance_and_means_that_do_not():
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(300):
        means = 1.414 + rng.normal(0, 0.001, size=3)  # 0.02/√400
        (row,) = weight_rows([cell(mean, name) for mean, name in zip(means, "abc", strict=True)])
        inside.append(row["low"] <= row["spread"] <= row["high"])
    assert 0.91 < np.mean(inside) < 0.985
    (apart,) = weight_rows([cell(1.413, "a"), cell(1.416, "b"), cell(1.417, "c")])
    assert not apart["inside"]
    assert apart["p_value"] < 0.02
    assert apart["spread"] == pytest.approx(0.004)
