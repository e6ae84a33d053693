"""What a projected optimiser does to updates: gates, gains, boxes, clipping, accumulation."""

import copy

import pytest
import torch
from assay_research.arms import GATES, Box, Gate

from assay.errors import DataError, UsageError
from assay.vhack import Basis, cin_over_modules
from assay.vhack.directions.delta import DeltaS, ProjectedOptimizer
from assay.vhack.directions.delta.step_measures import along
from tests.vhack.delta.conftest import (
    OPTIMISERS,
    backward,
    build,
    gradients_of,
    loss_of,
    own,
    random_basis,
)
from tests.wordings import refuses

every_optimiser = pytest.mark.parametrize("kind", OPTIMISERS)


def updates(adapter, optimiser, module, ids, steps):
    """Every step's update with its axes, [M, R] and [M, K, R] float64."""
    for _ in range(steps):
        backward(module, ids, optimiser)
        before = [p.detach().double().clone() for p in adapter.delta]
        optimiser.step()
        for p, old, axes in zip(adapter.delta, before, optimiser.frames.axes, strict=True):
            yield p.detach().double() - old, axes


@every_optimiser
@pytest.mark.parametrize("gate", ["one_sided", "two_sided"])
def test_an_update_never_leads_to_the_hack_and_two_sided_not_away_from_it(
    module, ids, small_svd, basis, kind, gate
):
    adapter, optimiser = build(
        module, small_svd, basis, kind, arm=own(level="update", gate=Gate(gate))
    )
    away = []
    for update, axes in updates(adapter, optimiser, module, ids, 30):
        hackward = -along(axes, update)
        size = update.norm(dim=1)
        leak = hackward.relu() if gate == "one_sided" else hackward
        assert (leak.norm(dim=1) <= 1e-6 * size).all()
        assert size.any()
        away.append(float(hackward.min()))
    assert (min(away) < -1e-4) == (gate == "one_sided")
    assert optimiser.measures.as_dict()["leak" + "_two_sided" * (gate == "two_sided")] <= 1e-6


def test_which_way_the_hack_is(module, small_svd, byte_tokenizer, small_pairs):
    """Descent on a loss that rewards hack sides moves along −v of a real basis, and the gate stops
    just that.
    """
    from assay.vhack import extract

    basis = extract(
        small_pairs, module, tokenizer=byte_tokenizer, svd=small_svd, n_heldout=0, top_k=1
    )
    texts = [(p.prompt, p.hack) for p in small_pairs], [(p.prompt, p.clean) for p in small_pairs]

    def nll(side):
        total = 0
        for prompt, completion in side:
            start = len(prompt)
            ids = torch.tensor([byte_tokenizer(prompt + completion)["input_ids"]])
            logits = module(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(logits, ids[0, start:])
        return total

    moved = {}
    for kind in ("none", "one_sided"):
        adapter = DeltaS(module, small_svd)
        optimiser = ProjectedOptimizer(
            torch.optim.SGD(adapter.delta, lr=1e-3),
            adapter,
            basis,
            arm=own(gate=Gate(kind), level="update"),
        )
        (nll(texts[0]) - nll(texts[1])).backward()
        optimiser.step()
        moved[kind] = optimiser.measures.as_dict()
        adapter.detach()
    assert moved["none"]["cin"] > 0.3
    assert moved["none"]["displacement"] < 0 < moved["none"]["displacement_hackward"]
    assert moved["one_sided"]["displacement_hackward"] <= 1e-9
    assert moved["one_sided"]["leak"] <= 1e-6


@every_optimiser
@pytest.mark.parametrize("level", ["gradient", "update"])
def test_without_axes_it_is_the_inner_optimiser_bit_by_bit(module, ids, small_svd, kind, level):
    other = copy.deepcopy(module)
    nothing = None if level == "update" else Basis({}, {}, {})
    arm = own(level=level, gate=Gate("two_sided"), box=Box())
    adapter, optimiser = build(module, small_svd, nothing, kind, arm=arm)
    assert not optimiser.frames
    plain = DeltaS(other, small_svd)
    inner = OPTIMISERS[kind](plain.delta)
    for _ in range(5):
        backward(module, ids, optimiser)
        backward(other, ids, inner)
        optimiser.step()
        inner.step()
    assert all(torch.equal(a, b) for a, b in zip(adapter.delta, plain.delta, strict=True))
    assert optimiser.measures.as_dict()["displacement_norm"] == 0


def test_modules_and_axes_that_are_not_there_are_left_alone_bit_by_bit(module, ids, small_svd):
    """Axes of one module only, one of them dropped: all others move as without."""
    name = "model.layers.0.mlp.up_proj"
    basis = random_basis(small_svd, skip=[n for n in small_svd if n != name])
    basis.axes[name][1] = 0
    other = copy.deepcopy(module)
    adapter, optimiser = build(
        module, small_svd, basis, arm=own(level="update", gate=Gate("two_sided"))
    )
    plain, inner = build(other, small_svd, None)
    backward(module, ids, optimiser)
    backward(other, ids, inner)
    optimiser.step()
    inner.step()
    found = adapter.values()
    wanted = plain.values()
    assert all(torch.equal(found[n], wanted[n]) == (n != name) for n in wanted)


def gated_by_hand(gradient, axes, gate):
    """The gates written out, one module and one axis at a time."""
    left = gradient.double().clone()
    for axis in axes.double():
        c = axis @ gradient.double()
        take = {"one_sided": max(c, torch.zeros(())), "two_sided": c}.get(gate.kind, 0 * c)
        left -= gate.gain * take * axis
    return left


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("gain", [1.0, 1.5])
def test_gates_on_the_gradient_are_the_formulas(module, ids, small_svd, basis, kind, gain):
    gate = Gate(kind, gain)
    adapter, optimiser = build(module, small_svd, basis, arm=own(gate=gate))
    backward(module, ids, optimiser)
    before = [p.grad.clone() for p in adapter.delta]
    optimiser.step()
    for p, rows, group in zip(adapter.delta, before, adapter.groups, strict=True):
        for name, row, after in zip(group.names, rows, p.grad, strict=True):
            wanted = (
                gated_by_hand(row, basis.axes[name], gate) if name in basis.axes else row.double()
            )
            torch.testing.assert_close(
                after.double(), wanted, rtol=1e-5, atol=1e-6 * float(row.norm())
            )
    if kind == "none":
        assert all(torch.equal(p.grad, g) for p, g in zip(adapter.delta, before, strict=True))


def test_cin_and_cout_are_those_of_the_checks(module, ids, small_svd, basis):
    adapter, optimiser = build(module, small_svd, basis, arm=own(gate=Gate("one_sided")))
    backward(module, ids, optimiser)

    def gradients():
        return {name: row[None].clone() for name, row in gradients_of(adapter).items()}

    before = gradients()
    optimiser.step()
    after = gradients()
    found = optimiser.measures.as_dict()
    for name, rows in (("cin", before), ("cout", after)):
        assert found[name] == pytest.approx(float(cin_over_modules(rows, basis)), abs=1e-6)
        assert found[name + "_two_sided"] == pytest.approx(
            float(cin_over_modules(rows, basis, two_sided=True)), abs=1e-6
        )
    assert found["cin"] > 0.01
    assert found["cout"] < 1e-6


@pytest.mark.parametrize("level", ["gradient", "update"])
@every_optimiser
def test_a_box_bounds_the_displacement(module, ids, small_svd, basis, level, kind):
    box = Box(hackward=0.01, away=0.02)
    adapter, optimiser = build(
        module, small_svd, basis, kind, arm=own(level=level, gate=Gate("none"), box=box)
    )
    with torch.no_grad():
        for p in adapter.delta:
            p.add_(0.3)
    starts = [p.detach().clone() for p in adapter.delta]
    state = optimiser.state_dict()
    optimiser.load_state_dict(state | {"vhack": state["vhack"] | {"start": starts}})
    for _ in range(15):
        backward(module, ids, optimiser)
        optimiser.step()
    touched = 0
    for p, start, axes in zip(adapter.delta, starts, optimiser.frames.axes, strict=True):
        at = along(axes, p.detach().double() - start.double())
        assert (at >= -0.01 - 1e-6).all()
        assert (at <= 0.02 + 1e-6).all()
        touched += int((at.abs() > 0.0099).sum())
    assert touched > 5


def test_in_the_box_it_may_go_away_and_come_back(module, ids, small_svd, basis):
    adapter, optimiser = build(module, small_svd, basis, arm=own(gate=Gate("none"), box=Box()))
    frames = optimiser.frames
    with torch.no_grad():
        for p, axes in zip(adapter.delta, frames.axes, strict=True):
            if axes.shape[1]:
                p.add_(axes.sum(dim=1).float())  # one unit away from the hack along every axis
    for p in adapter.delta:
        p.grad = torch.zeros_like(p)
    optimiser.step()  # weight decay alone: a little toward the hack, and still away from it
    assert optimiser.measures.as_dict()["leak"] > 0
    assert optimiser.measures.as_dict()["displacement_hackward"] <= 0
    assert optimiser.measures.as_dict()["displacement"] > 0.9 * sum(
        len(a) for a in basis.axes.values()
    )


def test_clipping_comes_after_the_gate(module, ids, small_svd, basis):
    adapter, optimiser = build(
        module, small_svd, basis, arm=own(gate=Gate("two_sided")), max_norm=1e-3
    )
    backward(module, ids, optimiser)
    optimiser.step()
    total = torch.cat([p.grad.flatten() for p in adapter.delta]).norm()
    assert total == pytest.approx(1e-3, rel=1e-3)
    assert optimiser.measures.as_dict()["cout_two_sided"] < 1e-5


def test_gradients_of_single_rollouts_are_those_of_passes_of_their_own(
    module, ids, small_svd, basis
):
    adapter, optimiser = build(module, small_svd, basis, arm=own(gate=Gate("none")))
    rows = []
    for row in ids:
        optimiser.zero_grad()
        (loss_of(module, row[None]) / len(ids)).backward()
        rows.append([p.grad.clone() for p in adapter.delta])
    with adapter.per_sample() as rollouts:
        for part in (ids[:2], ids[2:]):
            (loss_of(module, part) * len(part) / len(ids)).backward()
    for index, found in enumerate(rollouts.rows):
        for n in range(3):
            torch.testing.assert_close(found[:, n], rows[n][index], rtol=1e-3, atol=1e-6)
    with adapter.per_sample() as rollouts:
        pass  # no backward pass
    with refuses(UsageError, "gradients of single rollouts are those of passes of their own"):
        _ = rollouts.rows


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


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(module, small_svd, basis):
    _, optimiser = build(module, small_svd, basis)
    starts = [start_MR + 1 for start_MR in optimiser.state_dict()["vhack"]["start"]]
    bad = [optimiser.inner.state_dict()]
    for wrong in (starts[:-1], [*starts[:-1], torch.ones(2, 2)], [*starts[:-1], torch.ones(1, 1)]):
        state = optimiser.state_dict()
        bad.append(state | {"vhack": state["vhack"] | {"start": wrong}})
    state = optimiser.state_dict()
    bad.append(state | {"vhack": state["vhack"] | {"start": starts}, "param_groups": []})
    for state in bad:
        with refuses(DataError, "a state that does not fit is refused and changes nothing"):
            optimiser.load_state_dict(state)
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
def test_a_grad_scaler_changes_nothing_but_skips_infinite_gradients(
    module, ids, small_svd, basis, level
):
    other = copy.deepcopy(module)
    gate = Gate("one_sided")
    adapter, optimiser = build(
        module, small_svd, basis, arm=own(level=level, gate=gate), max_norm=0.5
    )
    plain, unscaled = build(other, small_svd, basis, arm=own(level=level, gate=gate), max_norm=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(2):
        optimiser.zero_grad()
        scaler.scale(loss_of(module, ids)).backward()
        scaler.step(optimiser)
        scaler.update()
        backward(other, ids, unscaled)
        unscaled.step()
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(adapter.delta, plain.delta, strict=True)
    )
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
    inner = torch.optim.SGD(
        [{"params": list(adapter.delta)}, {"params": [extra], "lr": 1.0}], lr=0.1
    )
    optimiser = ProjectedOptimizer(
        inner, adapter, basis, arm=own(gate=Gate("two_sided"), level="update")
    )
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
    elsewhere = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    for words, wrong in {
        "level='both'": lambda: own(level="both"),
        "max_norm": lambda: ProjectedOptimizer(inner, adapter, basis, arm=own(), max_norm=0.0),
        "without the parameters": lambda: ProjectedOptimizer(elsewhere, adapter, basis, arm=own()),
        "gate 'two'": lambda: Gate("two"),
        "gain": lambda: Gate("one_sided", -1.0),
        "box": lambda: Box(-1.0),
    }.items():
        with pytest.raises(UsageError, match=words):
            wrong()


def test_a_basis_that_does_not_fit_is_refused(module, small_svd, cut_svd):
    adapter = DeltaS(module, cut_svd)
    inner = torch.optim.SGD(adapter.delta, lr=0.1)
    wrong = random_basis(cut_svd)
    wrong.axes["other"] = torch.eye(3)
    with refuses(UsageError, "a basis that does not fit is refused"):
        ProjectedOptimizer(inner, adapter, wrong, arm=own())
    with refuses(UsageError, "a basis that does not fit is refused, 2"):
        ProjectedOptimizer(inner, adapter, random_basis(small_svd), arm=own())
    bent = random_basis(cut_svd)
    bent.axes["model.layers.0.mlp.up_proj"] *= 1.1
    bent.axes["model.layers.1.mlp.up_proj"] *= 2  # by 3 for each of the three axes
    with refuses(DataError, "a basis that does not fit is refused, 3"):
        ProjectedOptimizer(inner, adapter, bent, arm=own())
    bent.axes["model.layers.0.mlp.up_proj"][0, 0] = torch.nan
    with refuses(DataError, "a basis that does not fit is refused, 4"):
        ProjectedOptimizer(inner, adapter, bent, arm=own())
