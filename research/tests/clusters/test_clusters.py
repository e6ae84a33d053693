"""The experiment on published sets: rules side by side, on machines that are left out and on
cheats.
"""

import json

import numpy as np
import pytest
from assay_research.clusters.clusters import (
    HONEST,
    REAL,
    SIMULATED,
    ClusterPlan,
    CountRule,
    Oracle,
    drawn,
    simulated,
    summarise,
)
from assay_research.runs.report import build_report
from assay_research.runs.runs import read_run

from assay.errors import UsageError
from assay.stats import count_test, proportion_interval
from research.tests import published


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """A run over four honest machines, a faulty one, another build of the family and one of another
    family.
    """
    folder = tmp_path_factory.mktemp("clusters")
    patch = pytest.MonkeyPatch()
    patch.setattr("assay_research.clusters.clusters.LEAST_AUDITS", 0)
    patch.setattr("assay_research.clusters.clusters.CHEAT_AUDITS", 5)
    patch.setattr("assay_research.clusters.clusters.SAMPLES", 2)
    patch.setattr("assay_research.clusters.clusters.INSIDE_AUDITS", 5)
    rows = [
        *published.network(4, nonces=320),
        published.machine("2026-05__model-a-bad", bad=4, nonces=320),
        *[published.machine(f"2026-04__model-a-int4-{i}", model="x/Model-A-int4", noise=0.5, nonces=320)
          for i in range(2)],
        *[published.machine(f"2026-05__other-{i}", model="x/Other-B", of="b", noise=0.4, nonces=320)
          for i in range(2)],
    ]  # fmt: skip
    data = published.write(folder / "sets.jsonl.gz", rows)
    seen: list[tuple[int, int]] = []
    ClusterPlan(data=data, audits=10).measure(folder / "run", progress=lambda *at: seen.append(at))
    patch.undo()
    return data, folder / "run", seen


def test_every_rule_is_held_against_every_cheat(run):
    _, folder, seen = run
    cells = read_run(folder, "clusters").cells
    assert seen[-1] == (7, 7), "three models and four machines left out"
    (build,) = summarise(cells)["builds"]
    assert (build["build"], build["machines"], build["kinds"]) == (
        "2026-05 model-a",
        4,
        ["b200", "h100", "h200", "a100"],
    )
    rows = {(row["sort"], row["cheat"], row["rule"]): row for row in build["rows"]}
    honest = rows[HONEST, "", "ours"]
    assert (honest["accused"], honest["worst"], honest["audits"], honest["pairs"]) == (
        0.0,
        0.0,
        120,
        12,
    )
    of_machines = proportion_interval(0, build["machines"])
    assert (honest["low"], honest["high"]) == pytest.approx(of_machines), (
        "of four machines, not 120 audits"
    )
    int4 = rows[REAL, "model-a-int4", "ours"]
    assert int4["accused"] == 1.0
    assert int4["median"] <= 10
    assert int4["honest"] == {"64": 0.0, "300": 0.0}
    assert rows[REAL, "model-a-int4", "oracle"]["median"] <= int4["median"]
    simulated = {cheat for sort, cheat, _ in rows if sort == SIMULATED}
    assert {
        "all nonces × 1.4",
        "a share × 6",
        "a share as model-a-int4",
        "log-t, 4, × 1.4",
    } <= simulated
    assert "a share as 2026-05 other-b" in simulated
    for cheat in simulated:
        assert rows[SIMULATED, cheat, "ours"]["honest"]["300"] == 0


def test_faults_are_named_and_are_not_fraud(run):
    _, folder, _ = run
    models = {
        model["model"]: model for model in summarise(read_run(folder, "clusters").cells)["models"]
    }
    assert models["model-a"]["faulty_sets"] == ["2026-05__model-a-bad"]
    assert {(pair["pattern"], pair["outcome"]) for pair in models["model-a"]["faulty_pairs"]} == {
        ("position mod 16 in 0 to 3", "faulty")
    }
    assert models["model-a"]["sound_samples"] == {"not faulty": 24}
    assert models["other-b"]["faulty_pairs"] == []


def test_a_run_continues_and_has_a_page(run):
    data, folder, _ = run
    before = (folder / "clusters.jsonl").read_bytes()
    ClusterPlan(data=data, audits=10).measure(folder)
    assert (folder / "clusters.jsonl").read_bytes() == before
    page = build_report(folder).read_text()
    for words in (
        "Honest machines that the law does not know",
        "position mod 16 in 0 to 3",
        "oracle",
        "<svg",
    ):
        assert words in page
    with pytest.raises(UsageError, match="another audits"):
        ClusterPlan(data=data, audits=11).measure(folder)
    json.dumps(summarise(read_run(folder, "clusters").cells), allow_nan=False)


def test_the_count_is_the_published_one():
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 1, (6, 100)) ** 2
    rule = CountRule(0.41, 0.1, 0.05)
    accused, honest = rule.simulated(values, at=(64, 100))
    for row in range(6):
        for count in (1, 7, 64, 100):
            missed = int(np.count_nonzero(values[row, :count] > 0.41))
            assert accused[row, count - 1] == count_test(missed, count, 0.1, 0.05).fraud
    assert np.array_equal(honest, ~accused[:, [63, 99]])


def test_the_oracle_needs_the_fewest_nonces():
    rng = np.random.default_rng(0)
    honest, cheat = (np.exp(0.4 * rng.normal(size=5000) + shift) for shift in (0.0, 1.0))
    oracle = Oracle(honest, cheat)
    accused, cleared = oracle.simulated(drawn(rng, cheat, 50, 40), at=(40,))
    assert accused[:, -1].all()
    assert not cleared.any()
    accused, cleared = oracle.simulated(drawn(rng, honest, 200, 40), at=(40,))
    assert not accused.any()
    assert cleared.all()


def test_simulated_cheats_have_the_median_that_is_said():
    rng = np.random.default_rng(0)
    honest = 0.2 * np.exp(0.4 * rng.normal(size=2000))
    others = {"larger": 4 * honest, "smaller": 0.9 * honest}
    found = dict(simulated(honest, 0.1, others, rng))
    assert "a share as larger" in found
    assert "a share as smaller" not in found
    assert len(found) == 7
    for pool in found.values():
        assert np.median(pool) == pytest.approx(1.4 * np.median(honest), rel=0.03)
        audits = drawn(rng, pool, 3, 100)
        assert audits.shape == (3, 100)
        assert np.isin(audits, pool).all()
    _, usual = next(iter(simulated(honest, 0.4, {}, rng)))
    assert np.median(usual) == pytest.approx(1.4 * 0.4, rel=0.01), (
        "the usual size of the validator is larger"
    )
