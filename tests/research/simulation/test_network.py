from pathlib import Path

import numpy as np
import pytest

from assay import stats
from assay.errors import UsageError
from assay.research import simulation as module
from assay.research.runs import build_report, read_run
from assay.research.simulation import Kind, Network, SimulationPlan, run_simulation, simulate_network

SMALL = Network(nodes=600, cheating=0.05, rounds=30, validators=20, checkers=3, checked=16)
KINDS = (Kind("other weights", multiple=20.0), Kind("junk", junk=0.2), Kind("a little junk", junk=0.002))
LAWS = (stats.ScaleNoise(1e-4), stats.LogNoise(-4.0, 0.4))


@pytest.fixture(scope="module", params=LAWS, ids=["distance", "vector"])
def rows(request):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HONEST_TRIALS": 4000, "TRIALS": 500, "LIFETIME": 400, "LIFETIMES": 40}.items():
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


def test_less_junk_lives_longer_and_the_count_sees_less_of_it(rows):
    for rule in ("sequential", "lifetime"):
        assert rows[rule, "junk"]["paid"] < rows[rule, "a little junk"]["paid"]
    assert rows["sequential", "junk"]["paid"] <= rows["count", "junk"]["paid"]


def test_the_published_constants_convict_honest_nodes(rows):
    assert rows["published", "honest"]["convicted"] > rows["sequential", "honest"]["convicted"]


def test_draws_follow_the_law():
    for law in LAWS:
        chances = module._Chances(law, SMALL, np.random.default_rng(0))
        drawn = chances._residuals(Kind("honest"), (40_000,))
        for q in (0.5, 0.9, 0.99):
            beyond = float(np.mean(law.survival(np.array([np.quantile(drawn, q)]))))
            expected = 1 - q
            assert beyond == pytest.approx(expected, rel=0.12)


def test_a_panel_has_nobody_twice_and_prefers_stake():
    stakes = np.arange(1.0, 601.0)
    panels = module._panels(SMALL, stakes, np.random.default_rng(0))
    assert panels.shape[1] == SMALL.checkers
    assert all(len(set(panel)) == SMALL.checkers for panel in panels[:200])
    assert panels.min() > 580
    assert panels.mean() > stakes[-20:].mean()


def test_a_run_is_continued_and_drawn(tmp_path: Path, monkeypatch):
    for name, value in {"HONEST_TRIALS": 2000, "TRIALS": 200, "LIFETIME": 100, "LIFETIMES": 20}.items():
        monkeypatch.setattr(module, name, value)
    network = Network(nodes=300, cheating=0.02, rounds=5, validators=10, checkers=3, checked=8)
    run_simulation(SimulationPlan(presets=("hardened",), dtypes=("float16",), network=network), tmp_path)
    calls: list[int] = []
    run_simulation(
        SimulationPlan(dtypes=("float16",), network=network), tmp_path, progress=lambda done, of: calls.append(of)
    )
    assert calls == [2, 2]
    run = read_run(tmp_path, "simulate")
    assert [cell["preset"] for cell in run.cells] == ["hardened", "poc-2.0", "artifact"]
    page = build_report(tmp_path).read_text()
    assert "A network of 300 nodes over 5 rounds" in page
    assert "hardened, float16" in page


def test_weights_of_eight_bits_are_seen_in_float16_only(monkeypatch):
    for name, value in {"HONEST_TRIALS": 2000, "TRIALS": 200, "LIFETIME": 100, "LIFETIMES": 20}.items():
        monkeypatch.setattr(module, name, value)
    network = Network(nodes=1000, cheating=0.02, rounds=20, validators=20, checkers=3, checked=16)
    paid = {}
    plan = SimulationPlan()
    for dtype in plan.dtypes:
        rows = simulate_network(network, plan.law("poc-2.0", dtype), plan.kinds("poc-2.0", dtype)[:3])
        found = {row["kind"]: row for row in rows if row["rule"] == "sequential"}
        assert found["honest"]["convicted"] == 0
        paid[dtype] = found["int8 weights"]["paid"]
    assert paid["float16"] < 0.2 < 0.9 < paid["bfloat16"]


@pytest.mark.parametrize("wrong", [{"nodes": 0}, {"checkers": 101}, {"cheating": 0.7}, {"rounds": 0}])
def test_a_network_that_cannot_be_is_refused(wrong):
    with pytest.raises(UsageError):
        Network(**wrong)


def test_too_many_cheaters_and_odd_presets_are_refused():
    with pytest.raises(UsageError, match="at most half"):
        simulate_network(Network(cheating=0.3), LAWS[0], KINDS)
    with pytest.raises(UsageError, match="presets"):
        SimulationPlan(presets=("odd",))
    with pytest.raises(UsageError, match="dtypes float8"):
        SimulationPlan(dtypes=("float16", "float8"))
