"""The guard lets a real detector pass and finds every degenerate one."""

import numpy as np
import pytest

from assay.vhack.checks import CheckSettings
from assay.vhack.checks.pools import guard_scores

QUICK = CheckSettings(n_resamples=300)
GROUPS = [f"g{index % 60}" for index in range(240)]


def scores(seed, shift, n=240):
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1, n), rng.normal(0, 1, n)


def lengths(seed, shift=0.0):
    return tuple(side + 100 for side in scores(seed, shift))


def verdicts(hack, clean, *, sizes=None, groups=GROUPS):
    items = guard_scores(hack, clean, (groups, groups), sizes or lengths(9), QUICK)
    return {item.name: item.verdict for item in items}


def test_a_real_detector_passes():
    assert verdicts(*scores(0, 1.5)) == dict.fromkeys(("constant", "halves", "length"), "pass")


@pytest.mark.parametrize("same", [0.9, 1.0])
def test_a_constant_score_fails(same):
    hack, clean = scores(0, 1.5)
    still = np.random.default_rng(2).random((2, 240)) < same
    assert verdicts(np.where(still[0], 0, hack), np.where(still[1], 0, clean))["constant"] == "fail"


def test_a_perfect_rule_is_not_constant():
    assert verdicts(np.ones(240), np.zeros(240))["constant"] == "pass"
    items = guard_scores(np.ones(910), np.zeros(10), (["a", "b"] * 455, ["a", "b"] * 5), (np.ones(910), np.ones(10)))
    assert items[0].verdict == "pass"


def test_the_length_alone_fails_in_either_direction():
    sizes = lengths(3, shift=1.5)
    for sign in (1, -1):
        assert verdicts(*(sign * side for side in sizes), sizes=sizes)["length"] == "fail"
    noisy = tuple(side + np.random.default_rng(4).normal(0, 0.5, 240) for side in sizes)
    assert verdicts(*noisy, sizes=sizes)["length"] == "fail"


def test_a_detector_of_half_of_the_groups_fails_or_is_undecided():
    """Whatever half it is, one that knows some groups and not others is no detector of all."""
    hack, clean = scores(5, 0.0)
    assert verdicts(hack, clean)["length"] != "pass"
    names = list(dict.fromkeys(GROUPS))
    order = np.random.default_rng([QUICK.seed, 21]).permutation(len(names))
    known = {names[i] for i in order[:30]}
    knows = np.array([group in known for group in GROUPS])
    assert verdicts(np.where(knows, hack + 5, hack - 5), clean)["halves"] == "fail"
    few = [f"g{index}" for index in range(6)]
    assert verdicts(hack[:6], clean[:6], sizes=(hack[:6], clean[:6]), groups=few)["halves"] == "undecided"


def test_groups_of_one_kind_in_a_half_are_undecided():
    items = guard_scores([1, 2], [0], (["a", "a"], ["b"]), ([1, 2], [3]), QUICK)
    assert items[1].verdict == "undecided"


@pytest.mark.slow
def test_noise_passes_no_more_often_than_it_may():
    """Beating the length is a test of its own: noise that has nothing to do with labels seldom does."""
    passed = sum(verdicts(*scores(seed, 0.0), sizes=lengths(1000 + seed))["length"] == "pass" for seed in range(60))
    assert passed <= 6
