"""The verdicts of the third experiment follow the rules that its plan fixed."""

import pytest
from assay_research.study.claims import complete, judged, lasts, welch
from assay_research.study.log import RunLog
from scipy import stats

STEPS = 4


def log_of(seed, hack, solve=0.5, *, steps=STEPS, condition="adam/none"):
    header = {"kind": "run", "run": f"{condition}/{seed}", "condition": condition, "seed": seed}
    header |= {"settings": {"steps": STEPS}, "modes": []}
    return RunLog(
        header,
        [
            {"kind": "step", "step": step, "hack": hack, "solve": solve, "vacuous": hack, "displacement": 62.0}
            for step in range(steps)
        ],
    )


def runs(hack, solve=0.5, n=5, spread=0.0, **how):
    return [log_of(seed, hack + spread * (seed - n // 2), solve, **how) for seed in range(n)]


PLAIN, REFERENCE = runs(0.95), runs(0.0)


@pytest.mark.parametrize(
    ("own", "fails", "succeeds"),
    [
        (runs(0.9), "holds", "does not hold"),
        (runs(0.01, 0.49), "does not hold", "holds"),
        (runs(0.01, 0.3), "holds", "does not hold"),  # it does no work any more
        (runs(0.06, spread=0.02), "undecided", "undecided"),
    ],
)
def test_an_arm_is_judged_by_the_rule(own, fails, succeeds):
    for wanted, verdict in (("fails", fails), ("succeeds", succeeds)):
        assert judged("it", wanted, own, PLAIN, REFERENCE, fewest=5).verdict == verdict


def test_an_interval_is_wider_than_that_of_a_single_claim():
    own = runs(0.03, spread=0.01)  # 95 %: to 0.05, 99 %: to 0.06
    claim = judged("it", "succeeds", own, PLAIN, REFERENCE, fewest=5)
    assert claim.measured["d_h"].high == pytest.approx(0.03 + 4.604 * 0.015811 / 5**0.5, rel=1e-3)
    assert claim.verdict == "undecided"


def test_nothing_is_tested_where_plain_training_does_not_cheat_or_the_reference_does():
    honest = [*runs(0.95, n=3), *[log_of(seed, 0.2) for seed in (3, 4)]]
    assert judged("it", "succeeds", runs(0.0), honest, REFERENCE, fewest=5).verdict == "not tested"
    wrong = [*runs(0.0, n=4), log_of(4, 0.95)]
    assert "reference" in judged("it", "succeeds", runs(0.0), PLAIN, wrong, fewest=5).why
    assert lasts("it", (PLAIN, runs(0.0)), (honest, runs(0.0)), REFERENCE, fewest=3).verdict == "not tested"
    assert lasts("it", (PLAIN, runs(0.93)), (PLAIN, runs(0.0)), REFERENCE, fewest=3).verdict == "not tested"


def test_runs_that_were_cut_off_enter_no_verdict():
    cut = [*runs(0.0, n=4), log_of(4, 0.9, steps=2), log_of(5, 0.9, steps=0)]
    assert [complete(log) for log in cut] == [True] * 4 + [False] * 2
    claim = judged("it", "succeeds", cut, PLAIN, REFERENCE, fewest=5)
    assert (claim.verdict, claim.measured) == ("not run yet", {})
    assert judged("it", "succeeds", cut, PLAIN, REFERENCE, fewest=4).verdict == "holds"
    assert lasts("it", (PLAIN, runs(0.0)), ([], []), [], fewest=3).verdict == "not run yet"
    assert lasts("it", (PLAIN, runs(0.0)), (PLAIN, runs(0.0)), [], fewest=3).verdict == "not run yet"


def test_an_effect_that_is_not_there_cannot_fade_whatever_was_run_of_the_large_model():
    for large in ([], PLAIN[:1], PLAIN):
        claim = lasts("it", (PLAIN, runs(0.93)), (large, large), REFERENCE, fewest=3)
        assert (claim.verdict, "no effect in the small model" in claim.why) == ("not tested", True)
        assert set(claim.measured) == {"e_small"} | ({"e_large", "lost"} if large is PLAIN else set())


@pytest.mark.parametrize(
    ("large", "verdict"),
    [(runs(0.05), "holds"), (runs(0.6), "does not hold"), (runs(0.1, spread=0.05), "undecided")],
)
def test_an_effect_lasts_if_little_of_it_is_lost(large, verdict):
    assert lasts("it", (PLAIN, runs(0.0)), (PLAIN, large), REFERENCE, fewest=3).verdict == verdict


def test_the_interval_of_a_loss_is_welchs():
    one, other = [0.9, 1.0, 0.95, 0.92, 0.97], [0.5, 0.9, 0.7, 0.6, 0.8]
    found = welch(one, other)
    wanted = stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.99)
    assert found.value == pytest.approx(0.248)
    assert found.interval == pytest.approx((wanted.low, wanted.high))
