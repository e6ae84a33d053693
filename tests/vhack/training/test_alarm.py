"""The alarm: its false alarms under the null that it names, and how soon it is given."""

import numpy as np
import pytest

from assay.vhack.training.alarm import TOLERATED, Alarm

RUNS = 1500
STEPS = 150


@pytest.mark.slow
def test_it_is_given_no_more_often_than_it_says(monkeypatch):
    """At the very edge of the null, with rollouts of a step alike in some runs, and a level that
    1500 runs can show.
    """
    monkeypatch.setattr("assay.vhack.training.alarm.LEVEL", 0.1)
    rng = np.random.default_rng(0)
    given = 0
    for run in range(RUNS):
        alarm = Alarm()
        alike = (1, 4, 64)[run % 3]  # rollouts that share their fate
        for share in rng.binomial(64 // alike, TOLERATED, STEPS) * alike / 64:
            alarm.see(share)
        given += alarm.step is not None
    assert 0 < given <= 0.1 * RUNS


@pytest.mark.parametrize(("quiet", "share"), [(0, 0.2), (100, 0.35), (100, 0.9)])
def test_it_is_given_within_ten_steps_of_an_exploit(quiet, share):
    alarm = Alarm()
    for _ in range(quiet):
        assert alarm.see(0.0) < 0.1
    for _ in range(10):
        alarm.see(share)
    assert quiet < alarm.step <= quiet + 10
    assert alarm.see(0.0) == 1.0  # and stays given
