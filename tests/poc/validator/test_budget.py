"""Where nonces are spent."""

import random
from collections import Counter

import pytest

from assay.poc.validator.recomputer import Budget, choose, expected_nonces, verdict_of
from assay.poc.verdict import Account, AccountEvidence
from assay.poc.verdict.entries import Standing

RATES = {"alpha": 1e-3, "beta": 1e-2}


def standing(
    key: str,
    verdict: str = "undecided",
    *,
    n: int = 10,
    honest: float = 1.0,
    fraud: float = 0.0,
    fault=None,
):
    names = AccountEvidence.model_fields
    values = {
        "verdict": verdict,
        "n": n,
        "segments": 1,
        "log_e_value": fraud,
        "log_e_max": max(0.0, fraud),
    }
    values |= {"log_evidence_honest": honest, "audits": 1, "recorded": n}
    made = AccountEvidence(**{name: values[name] for name in names if name in values})
    account = Account(public_key=key, digest="0" * 64, build="b", preset="poc-2.0")
    return Standing(
        account=account, evidence=made, audits=1, recorded=n, begun=0.0, last=0.0, fault=fault
    )


def turns(standings, count=4000, share=0.1):
    chosen = choose(
        list(standings),
        {k: v for k, v in standings.items() if v},
        count,
        minimum_share=share,
        chance=random.Random(1),
        **RATES,
    )
    return Counter(chosen)


def test_convicted_nodes_get_nothing_and_undecided_ones_most():
    found = turns(
        {"a": None, "b": standing("b", "honest"), "c": standing("c", "fraud"), "d": standing("d")}
    )
    assert found["c"] == 0
    assert found.total() == 4000
    assert found["a"] + found["d"] > 0.85 * 4000
    assert 0.01 * 4000 < found["b"] < 0.06 * 4000


def test_every_node_that_is_not_convicted_keeps_its_minimum_share():
    standings = {f"n{i}": standing(f"n{i}", "honest" if i else "undecided") for i in range(20)}
    found = turns(standings, count=20_000)
    assert min(found[key] for key in standings) > 0.5 * 0.1 * 20_000 / 20


def test_nodes_near_a_decision_come_first():
    found = turns(
        {"near": standing("near", n=20, honest=4.0), "far": standing("far", n=20, honest=0.4)},
        share=0.0,
    )
    assert found["near"] > 5 * found["far"]


def test_a_faulty_node_is_watched_as_a_decided_one():
    found = turns({"a": standing("a", fault="position mod 8 in 0"), "b": standing("b")})
    assert found["a"] < 0.1 * 4000


def test_where_all_are_decided_all_are_watched_alike():
    found = turns({key: standing(key, "honest") for key in "abcd"})
    assert min(found.values()) > 800


def test_with_convicted_nodes_alone_nothing_is_spent():
    assert not turns({"a": standing("a", "fraud")})


def test_the_draws_differ_from_pass_to_pass():
    keys = [f"n{i}" for i in range(50)]
    passes = {tuple(choose(keys, {}, 10, minimum_share=0.1, **RATES)) for _ in range(20)}
    assert len(passes) == 20


@pytest.mark.parametrize(
    ("made", "nonces"),
    [
        (None, 32.0),
        (standing("a", n=10, honest=2.3025), 10.0),  # half way to ln 100 after ten
        (standing("a", n=10, honest=-5.0, fraud=3.4539), 10.0),  # half way to ln 1000 after ten
        (standing("a", n=100, honest=-1.0, fraud=-1.0), 100.0),
        (standing("a", n=1, honest=1000.0), 1.0),
    ],
)
def test_the_expected_nonces_follow_the_pace_of_the_evidence(made, nonces):
    assert expected_nonces(made, **RATES) == pytest.approx(nonces, rel=1e-3)


def test_a_fault_is_shown_beside_honest_evidence_and_never_hides_fraud():
    assert verdict_of(standing("a", "honest", fault="x")) == "faulty"
    assert verdict_of(standing("a", "fraud", fault="x")) == "fraud"
    assert verdict_of(None) == "undecided"


def test_nonces_come_at_an_even_rate_and_are_saved_for_an_hour(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("assay.poc.validator.recomputer.time.monotonic", lambda: now[0])
    budget = Budget(3600)
    assert budget.left() == 0
    assert budget.seconds_until(32) == pytest.approx(32)
    now[0] += 10
    assert budget.left() == 10
    budget.spend(10)
    assert budget.left() == 0
    now[0] += 100 * 3600
    assert budget.left() == 3600
    assert budget.seconds_until(10**6) == 0
