"""The arms of the library: what flagged rollouts are paid, and names that there are not."""

import pytest

from assay.errors import UsageError
from assay.vhack.directions.delta import ARMS, Arm, arm_named
from assay.vhack.directions.delta import arms as arms_module


def test_a_name_is_that_of_its_arm():
    assert all(arm_named(name) is arm and arm.name == name for name, arm in ARMS.items())


@pytest.mark.parametrize("name", ["filtre", "", "displaced-0.4+none"])
def test_without_assay_research_only_arms_of_the_library_are_there(monkeypatch, name):
    monkeypatch.setattr(arms_module, "entry_points", lambda **_: [])
    with pytest.raises(UsageError) as refused:
        arm_named(name)
    assert "penalty" in refused.value.wanted


def test_an_unknown_fate_of_flagged_rollouts_is_refused():
    with pytest.raises(UsageError):
        Arm("own", "", flagged="praise")
