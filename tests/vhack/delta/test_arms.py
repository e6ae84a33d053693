import doctest
import math

import pytest
import torch

from assay.errors import UsageError
from assay.vhack.directions.delta import ARMS, DeltaS, Gate, ProjectedOptimizer, arm_named
from assay.vhack.directions.delta.arms import BASIS_KINDS, Box
from tests.vhack.delta.conftest import loss_of, own


def test_what_each_arm_does():
    assert not ARMS["none"].acts
    assert [name for name, arm in ARMS.items() if arm.gate.kind == "one_sided"] == [
        "erase-gradient",
        "erase-update",
    ]
    assert ARMS["erase-update-two-sided"].gate == Gate("two_sided")
    assert ARMS["erase-update-two-sided"].level == "update"
    assert ARMS["box"].box == Box(0.0)
    assert {name for name, arm in ARMS.items() if arm.advantage} == {"advantage-modification"}
    assert all(arm_named(name) == arm and arm.start == 0 for name, arm in ARMS.items())


def test_a_bound_and_a_start_change_nothing_else():
    bounded = arm_named("erase-gradient+away-0.2")
    assert bounded.box == Box(hackward=0.0, away=0.2)
    assert (bounded.gate, bounded.level, bounded.start) == (
        ARMS["erase-gradient"].gate,
        "gradient",
        0,
    )
    held = arm_named("displaced-0.4+erase-update-two-sided")
    assert (held.gate, held.level, held.box) == (
        ARMS["erase-update-two-sided"].gate,
        "update",
        None,
    )
    assert held.start == 0.4
    both = arm_named("displaced-0.2+erase-gradient+away-1")
    assert (
        both.says
        == f"from 0.2 away from the hack: {ARMS['erase-gradient'].says}; at most 1 away from the "
        f"hack"
    )
    assert (both.start, both.box) == (0.2, Box(hackward=0.0, away=1.0))


NO_ARMS = ["erase", "none:random", "box:", "box:other", "", "displaced-0.4"]
NO_ARMS += [
    "displaced-x+none",
    "displaced--1+none",
    "displaced-0+none",
    "box+away-",
    "box+away-inf",
    "box+away-nan",
]


@pytest.mark.parametrize("name", [*NO_ARMS, "other+away-1"])
def test_arms_that_there_are_not(name):
    with pytest.raises(UsageError):
        arm_named(name)


def test_a_displaced_start_is_measured_from_the_model_and_outlives_a_checkpoint(
    module, ids, small_svd, basis
):
    def made(start):
        adapter = DeltaS(module, small_svd)
        arm = own(gate=Gate("two_sided"), level="update", start=start)
        return adapter, ProjectedOptimizer(
            torch.optim.Adam(adapter.delta, lr=0.02), adapter, basis, arm=arm
        )

    plain = module(input_ids=ids).logits
    adapter, optimiser = made(0.4)
    assert not torch.equal(module(input_ids=ids).logits, plain)
    loss_of(module, ids).backward()
    optimiser.step()
    for name, axes in basis.axes.items():
        torch.testing.assert_close(
            axes @ adapter.values()[name], torch.full((3,), 0.4), atol=1e-6, rtol=0
        )
    assert optimiser.measures.as_dict()["displacement"] == pytest.approx(
        0.4 * 3 * len(basis.axes), rel=1e-5
    )
    state = optimiser.state_dict()
    kept = [parameter.detach().clone() for parameter in adapter.delta]
    adapter.detach()
    adapter, resumed = made(0.0)
    for parameter, value in zip(adapter.delta, kept, strict=True):
        parameter.data.copy_(value)
    resumed.load_state_dict(state)
    loss_of(module, ids).backward()
    resumed.step()
    assert resumed.measures.as_dict()["displacement"] == pytest.approx(
        0.4 * 3 * len(basis.axes), rel=1e-5
    )


@pytest.mark.parametrize("kind", BASIS_KINDS)
def test_arms_along_other_axes(kind):
    arm = arm_named(f"displaced-0.4+erase-gradient:{kind}")
    assert arm.basis == kind
    assert arm.name == "displaced-0.4+erase-gradient" + ("" if kind == "true" else f":{kind}")
    assert (arm.gate, arm.start) == (ARMS["erase-gradient"].gate, 0.4)


def test_the_examples_in_the_docstrings_are_right():
    from assay.vhack.directions.delta import arms as _arms
    from assay.vhack.training import settings as _settings

    for module, examples in ((_arms, 2), (_settings, 2)):
        found = doctest.testmod(module)
        assert (found.failed, found.attempted) == (0, examples)


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
