"""The arms of the library: what flagged rollouts are paid, and names that there are not."""

import math

import pytest
import torch

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


def test_a_filter_pays_nothing_for_flagged_rollouts():
    rewards_BF = torch.tensor([[1.0, 0.3], [2.0, 0.3]])
    paid_BF = arm_named("filter").judge(rewards_BF, torch.tensor([True, False]), torch.ones(2))
    assert paid_BF[0].isnan().all()
    assert torch.equal(paid_BF[1], rewards_BF[1])


def test_a_penalty_takes_one_whatever_the_rewards_weigh():
    rewards_BF = torch.tensor(
        [[1.0, math.nan, 0.3], [math.nan, 2.0, 0.3], [1.0, 2.0, 0.3], [1.0, 2.0, 0.3]]
    )
    flags_B = torch.tensor([True, True, True, False])
    for weights in ([1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [0.5, 3.0, 0.0]):
        weights_F = torch.tensor(weights)
        paid_BF = arm_named("penalty").judge(rewards_BF, flags_B, weights_F)
        lost_B = ((rewards_BF - paid_BF).nan_to_num() * weights_F).sum(dim=1)
        torch.testing.assert_close(lost_B, flags_B.float())
        assert torch.equal(paid_BF[:, 2], rewards_BF[:, 2])  # what only tells, with weight 0
