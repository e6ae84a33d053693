"""Arms along axes: what their names stand for, and what they do to δS."""

import pytest
import torch
from assay_research.arms import ARMS, Box, Gate, arm_named
from assay_research.control_axes import BASIS_KINDS

from assay.errors import UsageError
from assay.vhack.directions.delta import ARMS as PAYING_ARMS
from assay.vhack.directions.delta import DeltaS, ProjectedOptimizer
from assay.vhack.directions.delta import arm_named as installed_arm_named
from tests.vhack.conftest import byte_tokenizer as byte_tokenizer
from tests.vhack.conftest import small_svd as small_svd
from tests.vhack.delta.conftest import basis as basis
from tests.vhack.delta.conftest import ids as ids
from tests.vhack.delta.conftest import loss_of, own
from tests.vhack.delta.conftest import module as module

NO_ARMS = ["erase", "none:random", "box:", "box:other", "", "displaced-0.4"]


def test_arms_of_the_library_do_nothing_along_axes():
    acting = {name for name, arm in ARMS.items() if arm.acts}
    assert acting == ARMS.keys() - PAYING_ARMS.keys() - {"advantage-modification"}
    for name, arm in PAYING_ARMS.items():
        assert (ARMS[name].flagged, ARMS[name].exploit_pays) == (arm.flagged, arm.exploit_pays)


def test_the_library_finds_them_by_name():
    assert installed_arm_named("displaced-0.4+none", gain=2.0).start == 0.4
    assert installed_arm_named("erase-update", gain=2.0).gate == Gate(gain=2.0)
    assert not installed_arm_named("none").acts


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
