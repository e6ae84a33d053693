"""The test of clusters: its bound under honest noise, its power, and what it says of honesty."""

import math
import tracemalloc

import numpy as np
import pytest

from assay.errors import UsageError
from assay.stats import ClusterTest, LogNoise
from assay.stats.cluster_test import ENDS
from assay.stats.noise_laws import Spread
from tests.stats.tokens import drawn, law_at

LAW = law_at(0.0625)
SKETCHES = LogNoise(math.log(0.01), 0.4)
RESPONSES = 16
TOKENS = 24


def logs(test: ClusterTest, pool: list[np.ndarray], seed: int, nodes: int = 400) -> np.ndarray:
    """Logarithms of the e-values of nodes after each of their responses, drawn from a pool with
    replacement.
    """
    paths = np.stack([test.paths(values, [len(values)])[0] for values in pool])
    chosen = np.random.default_rng(seed).integers(len(pool), size=(nodes, RESPONSES))
    return np.concatenate([test.log_e(paths[some].cumsum(axis=1)) for some in np.split(chosen, 10)])


def share_accused(found: np.ndarray) -> float:
    return float(np.mean(found.max(axis=1) >= math.log(1000)))


@pytest.mark.parametrize("between", [0.0, 0.7])
def test_honest_nodes_are_not_accused_and_the_e_value_has_mean_one_at_most(
    between: float, fewer: int
):
    test = ClusterTest(LAW, spread=Spread(0.05), between=between)
    found = logs(test, drawn(300 // fewer, TOKENS, LAW, between=between), 1, 400 // fewer)
    assert share_accused(found) <= 0.005
    assert np.exp(found[:, -1]).mean() < 1.5


@pytest.mark.slow
def test_responses_that_differ_more_than_a_law_knows_are_accused_and_one_that_knows_does_not(
    fewer: int,
):
    pool = drawn(300 // fewer, TOKENS, LAW, between=1.1, seed=2)
    naive = ClusterTest(LAW)
    knowing = ClusterTest(LAW, spread=Spread(0.05), between=1.1)
    accused = [share_accused(logs(test, pool, 3, 400 // fewer)) for test in (naive, knowing)]
    assert accused[0] > 0.05
    assert accused[1] <= 0.005


@pytest.mark.parametrize(("multiple", "share"), [(4.0, 0.6), (16.0, 0.99)])
def test_larger_noise_is_caught(multiple: float, share: float):
    test = ClusterTest(LAW, spread=Spread(0.05), between=0.2)
    assert (
        share_accused(logs(test, drawn(40, TOKENS, LAW, multiple=multiple, seed=4), 5, 100))
        >= share
    )


def test_a_cheat_in_some_of_the_responses_is_caught():
    test = ClusterTest(LAW, spread=Spread(0.05), between=0.2)
    pool = drawn(35, TOKENS, LAW, seed=6) + drawn(15, TOKENS, LAW, multiple=32, seed=7)
    assert share_accused(logs(test, pool, 8, 100)) > 0.95


def test_the_same_values_give_the_same_numbers_however_they_are_cut_into_blocks():
    values = drawn(1, 50, LAW, multiple=8)[0]
    whole = ClusterTest(LAW, between=0.3)
    blocks = ClusterTest(LAW, between=0.3)
    whole.take(values, [50])
    found = blocks.take(values, [7, 7, 30, 50])
    assert found[-1] == pytest.approx(whole.result.log_e_value)
    assert found[0] == found[1]
    assert blocks.result.log_e_max == pytest.approx(max(0, found.max()))
    assert (blocks.n, blocks.clusters) == (50, 1)


def test_a_long_response_is_summed_in_parts_that_bound_memory():
    """It was held as a whole: 3 MB of a foreign ledger took 12 GB."""
    test = ClusterTest(SKETCHES, spread=Spread(0.9), between=0.3)
    values = np.exp(np.random.default_rng(15).normal(SKETCHES.mu, 0.4, 6 * ENDS + 5))
    ends = range(len(values) + 1)
    whole = test.paths(values, ends)
    for end in (0, 1, ENDS - 1, ENDS, 3 * ENDS, len(values)):
        assert whole[end] == pytest.approx(test.paths(values, [end])[0], rel=1e-12, abs=1e-12)
    tracemalloc.start()
    found = test.take(values, ends)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == pytest.approx(test.log_e(whole))
    assert peak < 24 * 2**20


def test_a_test_has_no_more_in_memory_after_a_long_response_than_after_a_short_one():
    test = ClusterTest(LogNoise(-3.0, 0.5), between=0.1)
    short = test.paths([0.05], [1]).nbytes
    tracemalloc.start()
    test.take(np.full(ENDS, 0.05), range(1, ENDS + 1))
    in_memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert in_memory < 8 * short


def test_responses_of_one_node_may_come_in_any_order():
    pool = drawn(6, TOKENS, LAW, multiple=3)
    one = ClusterTest(LAW, between=0.3)
    other = ClusterTest(LAW, between=0.3)
    for values in pool:
        one.take(values, [len(values)])
    for values in reversed(pool):
        other.take(values, [len(values)])
    assert one.result.log_e_value == pytest.approx(other.result.log_e_value)
    assert one.result.log_evidence_honest == pytest.approx(other.result.log_evidence_honest)


def test_an_honest_node_becomes_honest_and_a_cheat_that_is_excluded_never_does():
    excluded = ClusterTest(LAW, effect=8.0)
    for values in drawn(60, TOKENS, LAW, seed=9):
        excluded.take(values, [len(values)])
    assert excluded.result.verdict == "honest"
    cheat = ClusterTest(LAW, effect=8.0)
    for values in drawn(40, TOKENS, LAW, multiple=8.0, seed=10):
        cheat.take(values, [len(values)])
    assert cheat.result.verdict == "fraud"
    assert cheat.result.log_evidence_honest < 0


def test_enough_responses_exclude_a_share_of_them_and_the_verdict_names_what_is_weakest():
    test = ClusterTest(LAW, effect=8.0)
    test.take(drawn(1, TOKENS, LAW)[0], [TOKENS])
    assert list(test.evidence) == ["8 times the honest noise"]
    for values in drawn(20, TOKENS, LAW, seed=11):
        test.take(values, [len(values)])
    assert any(name.startswith("30% of the responses") for name in test.evidence)
    assert test.result.weakest in test.evidence


def test_sketches_are_judged_by_their_distances():
    rng = np.random.default_rng(13)
    test = ClusterTest(SKETCHES, spread=Spread(0.05), between=0.2)
    honest = [
        np.exp(SKETCHES.mu + 0.2 * rng.standard_normal() + 0.35 * rng.standard_normal(2))
        for _ in range(200)
    ]
    assert share_accused(logs(test, honest, 14)) <= 0.005
    test.take([0.2, math.nan], [2])  # twenty times as far, and a missing one
    assert test.result.verdict == "fraud"


@pytest.mark.parametrize(
    "values", [{"alpha": 0}, {"beta": 1}, {"effect": 1}, {"effect": math.inf}, {"between": -1}]
)
def test_what_is_out_of_range_is_refused(values: dict[str, float]):
    with pytest.raises(UsageError):
        ClusterTest(LAW, **values)
