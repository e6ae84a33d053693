from pathlib import Path

import numpy as np
import pytest
from assay_research import simulation as module
from assay_research.runs.report import build_report
from assay_research.runs.runs import read_run
from assay_research.simulation import Kind, Network, SimulationPlan, draw_residuals, simulate_network

from assay import stats
from assay.poc import Noise

SMALL = Network(nodes=600, cheating=0.05, rounds=30, validators=20, checkers=3, checked=16)
KINDS = (Kind("other weights", multiple=20.0), Kind("junk", junk=0.2), Kind("a little junk", junk=0.002))
LAWS = (Noise(stats.ScaleNoise(1e-4), "distances"), Noise(stats.LogNoise(-4.0, 0.4), "vectors"))
FEW = {"HONEST_TRIALS": 2000, "TRIALS": 200}


@pytest.fixture(scope="module", params=LAWS, ids=["distance", "vector"])
def rows(request):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HONEST_TRIALS": 4000, "TRIALS": 500}.items():
            patch.setattr(module, name, value)
        found = simulate_network(SMALL, request.param, KINDS)
        again = simulate_network(SMALL, request.param, KINDS)
    assert found == again, "the seed decides"
    return {(row["rule"], row["kind"]): row for row in found}


def test_every_rule_judges_every_kind(rows):
    assert len(rows) == 4 * (1 + len(KINDS))
    assert sum(row["nodes"] for (rule, _), row in rows.items() if rule == "count") == SMALL.nodes


def test_other_weights_are_gone_at_once_and_honest_nodes_stay(rows):
    for rule in ("sequential", "lifetime"):
        assert rows[rule, "other weights"]["rounds_99"] <= 2
        assert rows[rule, "other weights"]["paid"] < 0.05
        assert rows[rule, "honest"]["convicted"] <= 6
        assert rows[rule, "honest"]["paid"] > 0.97


def test_draws_follow_the_law():
    for noise in LAWS:
        law = noise.law
        drawn = np.abs(draw_residuals(noise, Kind("honest"), 40_000, 1, np.random.default_rng(0)))
        for q in (0.5, 0.9, 0.99):
            beyond = float(np.mean(law.survival(np.array([np.quantile(drawn, q)]))))
            assert beyond == pytest.approx(1 - q, rel=0.12)


def test_a_run_is_continued_and_drawn(tmp_path: Path, monkeypatch):
    for name, value in FEW.items():
        monkeypatch.setattr(module, name, value)
    network = Network(nodes=300, cheating=0.02, rounds=5, validators=10, checkers=3, checked=8)
    few = SimulationPlan(presets=("hardened",), dtypes=("float16",), laws=("default",), network=network)
    few.measure(tmp_path)
    calls: list[int] = []
    more = SimulationPlan(presets=("hardened", "artifact"), dtypes=("float16",), network=network)
    more.measure(tmp_path, progress=lambda done, of: calls.append(of))
    assert calls == [3, 3, 3]
    run = read_run(tmp_path, "simulate")
    assert [(cell["preset"], cell["law"]) for cell in run.cells] == [
        ("hardened", "default"),
        ("artifact", "default"),
        ("hardened", "predictive"),
        ("artifact", "predictive"),
    ]
    assert [{row["rule"] for row in cell["rows"]} for cell in run.cells[2:]] == [{"lifetime"}] * 2
    page = build_report(tmp_path).read_text()
    assert "A network of 300 nodes over 5 rounds" in page
    assert "hardened, float16, predictive law" in page


def test_a_late_cheat_is_honest_until_its_round():
    late = Kind("late", multiple=20.0, honest_for=0.5)
    found = {row["rule"]: row for row in simulate_network(SMALL, LAWS[0], (late,), rules=("sequential", "lifetime"))
             if row["kind"] == "late"}  # fmt: skip
    for row in found.values():
        assert 16 <= row["rounds_median"] <= row["rounds_99"] <= 17
        assert 0.45 < row["paid"] < 0.6
