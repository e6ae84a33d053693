"""The approaches: verdicts from tests, cells that resume, and what a small model gives."""

import numpy as np
import pytest
from assay_research import approaches as module
from assay_research.approaches import ApproachPlan, distribution, residual_sizes, told_apart
from assay_research.runs.runs import read_run

from assay.errors import UsageError
from assay.stats.chord import chord_mean, chord_std

CHOSEN = ("poc-2.0", "permutation", "artifact", "layer-normalize", "hardened")


@pytest.fixture(scope="module")
def measured(small_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    plan(small_checkpoint).measure(folder)
    return folder


def plan(checkpoint, **changes) -> ApproachPlan:
    values = {
        "models": (str(checkpoint),),
        "approaches": CHOSEN,
        "nonces": 48,
        "checked": 16,
        "timed": 1,
    }
    return ApproachPlan(
        **values | {"seq_len": 16, "batch_size": 16, "dtype": "float32", "device": "cpu"} | changes
    )


def test_every_approach_has_a_cell(measured, small_checkpoint):
    cells = {cell["approach"]: cell for cell in read_run(measured, "approaches").cells}
    assert set(cells) == set(CHOSEN)
    for cell in cells.values():
        assert cell["nonces"] == 3 * 48
        assert 0 <= cell["auc_interval"][0] <= cell["auc"] <= cell["auc_interval"][1] <= 1
        assert cell["spreads"][0]["rate"] == 0.5
    assert cells["poc-2.0"]["breaks_structure"] == "yes"
    assert abs(cells["poc-2.0"]["mean"] - 2**0.5) < 0.002
    assert (cells["artifact"]["dimension"], cells["permutation"]["dimension"]) == (12, 512)
    assert 1 < cells["poc-2.0"]["effective_dimension"] <= 80
    assert cells["permutation"]["effective_dimension"] is None


def test_a_second_run_measures_nothing_and_other_settings_are_refused(
    measured, small_checkpoint, monkeypatch
):
    before = (measured / "approaches.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_model", None)
        plan(small_checkpoint).measure(measured)
    assert (measured / "approaches.jsonl").read_bytes() == before
    with pytest.raises(UsageError, match="another nonces"):
        plan(small_checkpoint, nonces=47).measure(measured)


def blocks(shift: float, scale: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    mean = chord_mean(8192)
    std = chord_std(8192)
    return [rng.normal(mean + i * shift * std, scale * std, size=4000) for i in range(3)]


@pytest.mark.parametrize(
    ("distances", "verdict"),
    [
        (blocks(0.0), "yes"),  # nothing but chance
        (blocks(0.03), "partly"),  # 1 and 2 points off: beyond chance, below the published limit
        (blocks(0.5), "no"),
    ],
)
def test_the_verdict_comes_from_the_distances(distances, verdict: str):
    found = distribution(dict(zip("abc", distances, strict=True)), 8192, 0.5, 64, 64.0)
    assert found["breaks_structure"] == verdict


def test_cheaters_are_told_from_honest_nodes_by_their_residuals():
    rng = np.random.default_rng(0)
    honest, cheat = rng.normal(size=(2, 400)) * [[1e-4], [1e-3]]
    truth = np.full(400, 1.41, dtype=np.float64)
    apart = told_apart(
        residual_sizes((truth + honest).astype(np.float32), truth.astype(np.float32)),
        residual_sizes((truth + cheat).astype(np.float32), truth.astype(np.float32)),
    )
    assert apart["separation"] == pytest.approx(10, rel=0.2)
    low, high = apart["auc_interval"]
    assert 0.9 < low < apart["auc"] < high < 1
    exact = 1 - 2 / np.pi * np.arctan(0.1)  # of two half-normals, one ten times as wide
    assert low < exact < high
    vectors = np.zeros((3, 2), dtype=np.float32)
    assert residual_sizes(np.add(vectors, [3, 4]), vectors).tolist() == [5, 5, 5]
