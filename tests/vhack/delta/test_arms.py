import doctest
import math
from pathlib import Path

import pytest
import torch

from assay.errors import UsageError
from assay.vhack import Basis
from assay.vhack.delta import ARMS, DeltaS, Gate, ProjectedOptimizer, arm_named
from assay.vhack.delta.arms import BASIS_KINDS, Box
from tests.vhack.delta.conftest import loss_of, own

ROOT = Path(__file__).parents[3]


def test_what_each_arm_does():
    assert not ARMS["none"].acts
    assert [name for name, arm in ARMS.items() if arm.gate.kind == "one_sided"] == ["erase-gradient", "erase-update"]
    assert ARMS["erase-update-two-sided"].gate == Gate("two_sided")
    assert ARMS["erase-update-two-sided"].level == "update"
    assert ARMS["box"].box == Box(0.0)
    assert ARMS["constant-push"].push == 0.6
    assert ARMS["trusted-complement"].gate.kind == "keep"
    assert {name for name, arm in ARMS.items() if arm.advantage} == {"advantage-modification"}
    assert all(arm_named(name) == arm and arm.start == 0 for name, arm in ARMS.items())


def test_a_bound_and_a_start_change_nothing_else():
    bounded = arm_named("erase-gradient+away-0.2")
    assert bounded.box == Box(hackward=0.0, away=0.2)
    assert (bounded.gate, bounded.level, bounded.start) == (ARMS["erase-gradient"].gate, "gradient", 0)
    held = arm_named("displaced-0.4+erase-update-two-sided")
    assert (held.gate, held.level, held.box) == (ARMS["erase-update-two-sided"].gate, "update", None)
    assert held.start == 0.4
    both = arm_named("displaced-0.2+erase-gradient+away-1")
    assert both.says == f"from 0.2 away from the hack: {ARMS['erase-gradient'].says}; at most 1 away from the hack"
    assert (both.start, both.box) == (0.2, Box(hackward=0.0, away=1.0))
    moved = arm_named("displaced-0.4+none:random")
    assert (moved.name, moved.start, moved.basis) == ("displaced-0.4+none:random", 0.4, "random")


NO_ARMS = ["erase", "none:random", "box:", "box:other", "trusted-complement:random", "", "displaced-0.4"]
NO_ARMS += ["displaced-x+none", "displaced--1+none", "displaced-0+none", "box+away-", "box+away-inf", "box+away-nan"]


@pytest.mark.parametrize("name", [*NO_ARMS, "other+away-1"])
def test_arms_that_there_are_not(name):
    with pytest.raises(UsageError):
        arm_named(name)


def test_a_displaced_start_is_measured_from_the_model_and_outlives_a_checkpoint(module, ids, small_svd, basis):
    def made():
        adapter = DeltaS(module, small_svd)
        return adapter, ProjectedOptimizer(
            torch.optim.Adam(adapter.delta, lr=0.02), adapter, basis, arm=own(gate=Gate("two_sided"), level="update")
        )

    adapter, optimiser = made()
    plain = module(input_ids=ids).logits
    optimiser.displace(0.4)
    assert not torch.equal(module(input_ids=ids).logits, plain)
    loss_of(module, ids).backward()
    optimiser.step()
    for name, axes in basis.axes.items():
        torch.testing.assert_close(axes @ adapter.values()[name], torch.full((3,), 0.4), atol=1e-6, rtol=0)
    assert optimiser.measures.as_dict()["displacement"] == pytest.approx(0.4 * 3 * len(basis.axes), rel=1e-5)
    state, kept = optimiser.state_dict(), [parameter.detach().clone() for parameter in adapter.delta]
    adapter.detach()
    adapter, resumed = made()
    for parameter, value in zip(adapter.delta, kept, strict=True):
        parameter.data.copy_(value)
    resumed.load_state_dict(state)
    loss_of(module, ids).backward()
    resumed.step()
    assert resumed.measures.as_dict()["displacement"] == pytest.approx(0.4 * 3 * len(basis.axes), rel=1e-5)


@pytest.mark.parametrize("kind", BASIS_KINDS)
def test_arms_along_other_axes(kind):
    arm = arm_named(f"erase-gradient:{kind}")
    assert arm.basis == kind
    assert arm.name == ("erase-gradient" if kind == "true" else f"erase-gradient:{kind}")
    assert arm.gate == ARMS["erase-gradient"].gate


def test_the_examples_in_the_docstrings_are_right():
    from assay.vhack.delta import arms as _arms
    from assay.vhack.training import settings as _settings

    for module, examples in ((_arms, 2), (_settings, 2)):
        found = doctest.testmod(module)
        assert (found.failed, found.attempted) == (0, examples)


def test_a_push_moves_along_every_axis_by_its_share_of_the_rate(module, ids, small_svd, basis):
    adapter = DeltaS(module, small_svd)
    sgd = torch.optim.SGD(adapter.delta, lr=0.02)
    optimiser = ProjectedOptimizer(sgd, adapter, basis, arm=own(gate=Gate("two_sided"), level="update", push=0.6))
    for _ in range(3):
        optimiser.zero_grad()
        loss_of(module, ids).backward()
        optimiser.step()
    for name, axes in basis.axes.items():
        torch.testing.assert_close(axes @ adapter.values()[name], torch.full((3,), 3 * 0.6 * 0.02), atol=1e-6, rtol=0)
    assert optimiser.measures.as_dict()["displacement"] == pytest.approx(3 * 0.6 * 0.02 * 3 * len(basis.axes), rel=1e-5)


def test_watched_axes_are_measured_and_not_acted_on(module, ids, small_svd, basis):
    control = Basis({name: axes.flip(1) for name, axes in basis.axes.items()}, basis.singular_values, basis.votes)
    adapter = DeltaS(module, small_svd)
    adam = torch.optim.Adam(adapter.delta, lr=0.02)
    optimiser = ProjectedOptimizer(
        adam, adapter, control, arm=own(gate=Gate("two_sided"), level="update"), watched=basis
    )
    loss_of(module, ids).backward()
    optimiser.step()
    found = optimiser.measures.as_dict()
    assert found["leak_two_sided"] < 1e-6 < found["watched_leak_two_sided"]
    moved = sum(float((axes @ adapter.values()[name]).sum()) for name, axes in basis.axes.items())
    assert found["watched_displacement"] == pytest.approx(moved, rel=1e-4)
    assert math.isclose(found["displacement_norm"], 0, abs_tol=1e-6)
