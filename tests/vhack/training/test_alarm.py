"""The alarm: its false alarms under the null that it names, and how soon it is given."""

import numpy as np
import pytest

from assay.errors import UsageError
from assay.vhack.training.alarm import Alarm

RUNS = 1500
STEPS = 150


@pytest.mark.slow
def test_it_is_given_no_more_often_than_it_says():
    """At the very edge of the null, with rollouts of a step alike in some runs, and a level that
    1500 runs can show.
    """
    rng = np.random.default_rng(0)
    given = 0
    for run in range(RUNS):
        alarm = Alarm(level=0.1)
        alike = (1, 4, 64)[run % 3]  # rollouts that share their fate
        for share in rng.binomial(64 // alike, alarm.tolerated, STEPS) * alike / 64:
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


def test_a_share_that_is_none_is_refused():
    with pytest.raises(UsageError):
        Alarm(tolerated=0.0)
    with pytest.raises(UsageError):
        Alarm(level=1.0)
