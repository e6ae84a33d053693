"""Names of arms that start elsewhere or are bounded."""

import pytest

from assay.errors import UsageError
from assay.vhack.study import Run
from assay.vhack.study._arms import displaced, study_arm
from assay.vhack.training import ARMS, Box


def test_names_of_the_table_are_what_they_are():
    for name, arm in ARMS.items():
        assert study_arm(name) == arm
        assert displaced(name) == 0.0


def test_a_bound_and_a_start_change_nothing_else():
    bounded = study_arm("erase-gradient+away-0.2")
    assert bounded.box == Box(hackward=0.0, away=0.2)
    assert (bounded.gate, bounded.level) == (ARMS["erase-gradient"].gate, "gradient")
    held = study_arm("displaced-0.4+erase-update-two-sided")
    assert (held.gate, held.level, held.box) == (ARMS["erase-update-two-sided"].gate, "update", None)
    assert displaced(held.name) == 0.4
    both = study_arm("displaced-0.2+erase-gradient+away-1")
    assert (displaced(both.name), both.box) == (0.2, Box(hackward=0.0, away=1.0))
    assert Run(both.name, 0).how == both


@pytest.mark.parametrize(
    "name",
    [
        "displaced-0.4",
        "displaced-x+none",
        "displaced--1+none",
        "displaced-0+none",
        "box+away-",
        "box+away-inf",
        "box+away-nan",
        "other+away-1",
    ],
)
def test_what_is_no_arm_is_refused(name):
    with pytest.raises(UsageError):
        Run(name, 0)
