"""A projected optimiser as others use it: its state, schedulers, scalers, closures and hooks, and what it refuses."""

import copy

import pytest
import torch

from assay.errors import DataError, UsageError
from assay.vhack.delta import DeltaS, Gate, ProjectedOptimizer
from assay.vhack.delta.arms import Box
from tests.vhack.delta.conftest import (
    OPTIMISERS,
    backward,
    build,
    loss_of,
    own,
    random_basis,
)


def test_state_round_trip_continues_identically(module, ids, small_svd, basis, tmp_path):
    other = copy.deepcopy(module)
    settings = {"arm": own(Gate("one_sided", 1.1), level="update", box=Box(0.001, 0.02))}
    adapter, optimiser = build(module, small_svd, basis, **settings)
    for _ in range(3):
        backward(module, ids, optimiser)
        optimiser.step()
    adapter.save(tmp_path / "delta.safetensors")
    torch.save(optimiser.state_dict(), tmp_path / "optimizer.pt")

    again = DeltaS(other, small_svd)
    again.load(tmp_path / "delta.safetensors")
    resumed = ProjectedOptimizer(OPTIMISERS["adamw"](again.delta), again, basis, **settings)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for _ in range(3):
        backward(module, ids, optimiser)
        backward(other, ids, resumed)
        optimiser.step()
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(adapter.delta, again.delta, strict=True))
    assert resumed.measures.as_dict() == optimiser.measures.as_dict()
    assert resumed.param_groups is resumed.inner.param_groups
    assert resumed.state is resumed.inner.state


def test_a_state_that_does_not_fit_is_refused(module, small_svd, basis):
    _, optimiser = build(module, small_svd, basis)
    with pytest.raises(DataError, match="does not fit"):
        optimiser.load_state_dict(optimiser.inner.state_dict())
    state = optimiser.state_dict()
    state["vhack"]["start"].pop()
    with pytest.raises(DataError, match="does not fit"):
        optimiser.load_state_dict(state)
    for shape in [(2, 2), (1, 1)]:
        state = optimiser.state_dict()
        state["vhack"]["start"][-1] = torch.zeros(shape)
        with pytest.raises(DataError, match="does not fit"):
            optimiser.load_state_dict(state)


def test_a_state_that_is_refused_changes_nothing(module, small_svd, basis):
    _, optimiser = build(module, small_svd, basis)
    state = optimiser.state_dict()
    state["vhack"]["start"] = [start_MR + 1 for start_MR in state["vhack"]["start"]]
    with pytest.raises(DataError, match="does not fit"):
        optimiser.load_state_dict({**state, "param_groups": []})
    assert not any(start_MR.any() for start_MR in optimiser.state_dict()["vhack"]["start"])


def test_schedulers_take_it_for_an_optimiser(module, ids, small_svd, basis):
    _, optimiser = build(module, small_svd, basis)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step))
    for _ in range(2):
        backward(module, ids, optimiser)
        optimiser.step()
        scheduler.step()
    assert optimiser.inner.param_groups[0]["lr"] == pytest.approx(0.02 / 3)
    assert optimiser.param_groups is optimiser.inner.param_groups


@pytest.mark.parametrize("level", ["gradient", "update"])
def test_a_grad_scaler_changes_nothing_but_skips_infinite_gradients(module, ids, small_svd, basis, level):
    other = copy.deepcopy(module)
    gate = Gate("one_sided")
    adapter, optimiser = build(module, small_svd, basis, arm=own(level=level, gate=gate), max_norm=0.5)
    plain, unscaled = build(other, small_svd, basis, arm=own(level=level, gate=gate), max_norm=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(2):
        optimiser.zero_grad()
        scaler.scale(loss_of(module, ids)).backward()
        scaler.step(optimiser)
        scaler.update()
        backward(other, ids, unscaled)
        unscaled.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(adapter.delta, plain.delta, strict=True))
    before = [p.detach().clone() for p in adapter.delta]
    adapter.delta[0].grad.fill_(torch.inf)
    scaler.scale(torch.ones(()))
    scaler.step(optimiser)
    assert all(torch.equal(a, b) for a, b in zip(adapter.delta, before, strict=True))


def test_a_closure_is_evaluated_before_the_gate(module, ids, small_svd, basis):
    adapter, optimiser = build(module, small_svd, basis, arm=own(gate=Gate("two_sided")))

    def closure():
        optimiser.zero_grad()
        loss = loss_of(module, ids)
        loss.backward()
        return loss.item()

    first = optimiser.step(closure)
    assert optimiser.measures.as_dict()["cout_two_sided"] < 1e-6
    assert optimiser.step(closure) < first
    assert all(p.grad is not None for p in adapter.delta)


def test_other_parameters_are_stepped_and_not_projected(module, ids, small_svd, basis):
    extra = torch.nn.Parameter(torch.ones(3))
    adapter = DeltaS(module, small_svd)
    inner = torch.optim.SGD([{"params": list(adapter.delta)}, {"params": [extra], "lr": 1.0}], lr=0.1)
    optimiser = ProjectedOptimizer(inner, adapter, basis, arm=own(gate=Gate("two_sided"), level="update"))
    extra.grad = torch.ones(3)
    loss_of(module, ids).backward()
    optimiser.step()
    assert torch.equal(extra.detach(), torch.zeros(3))
    late = torch.nn.Parameter(torch.ones(2))
    optimiser.add_param_group({"params": [late]})
    assert len(inner.param_groups) == 3
    late.grad = torch.ones(2)
    optimiser.step()
    assert torch.equal(late.detach(), torch.full((2,), 0.9))
    optimiser.zero_grad()
    assert late.grad is None


def test_another_basis_keeps_the_start(module, ids, small_svd, basis):
    _, optimiser = build(module, small_svd, basis, arm=own(level="update", gate=Gate("two_sided")))
    backward(module, ids, optimiser)
    optimiser.step()
    optimiser.use_basis(random_basis(small_svd, seed=9))
    backward(module, ids, optimiser)
    optimiser.step()
    assert optimiser.measures.as_dict()["leak_two_sided"] < 1e-6
    assert optimiser.measures.as_dict()["displacement_norm"] > 0


def test_what_cannot_be_is_refused(module, small_svd, basis):
    adapter = DeltaS(module, small_svd)
    inner = torch.optim.SGD(adapter.delta, lr=0.1)
    with pytest.raises(UsageError, match="level='both'"):
        own(level="both")
    with pytest.raises(UsageError, match="max_norm"):
        ProjectedOptimizer(inner, adapter, basis, max_norm=0.0)
    with pytest.raises(UsageError, match="without the parameters"):
        ProjectedOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0), adapter, basis)
    with pytest.raises(UsageError, match="gate 'two'"):
        Gate("two")
    with pytest.raises(UsageError, match="gain"):
        Gate("one_sided", -1.0)
    with pytest.raises(UsageError, match="box"):
        Box(-1.0)


def test_a_basis_that_does_not_fit_is_refused(module, small_svd):
    adapter = DeltaS(module, small_svd.truncated(8))
    inner = torch.optim.SGD(adapter.delta, lr=0.1)
    wrong = random_basis(small_svd.truncated(8))
    wrong.axes["other"] = torch.eye(3)
    with pytest.raises(UsageError, match="axes of other"):
        ProjectedOptimizer(inner, adapter, wrong)
    with pytest.raises(UsageError, match="coordinates"):
        ProjectedOptimizer(inner, adapter, random_basis(small_svd))
    bent = random_basis(small_svd.truncated(8))
    bent.axes["model.layers.0.mlp.up_proj"] *= 1.1
    bent.axes["model.layers.1.mlp.up_proj"] *= 2  # by 3 for each of the three axes
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.up_proj that are 5\.2 away from orthonormal"):
        ProjectedOptimizer(inner, adapter, bent)
    bent.axes["model.layers.0.mlp.up_proj"][0, 0] = torch.nan
    with pytest.raises(DataError, match=r"layers\.0\.mlp\.up_proj that are nan away"):
        ProjectedOptimizer(inner, adapter, bent)
