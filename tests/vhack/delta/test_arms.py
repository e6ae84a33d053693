import doctest
import math
from pathlib import Path

import pytest
import torch

from assay.errors import DataError, UsageError
from assay.vhack import Basis, PairGradients
from assay.vhack.delta import ARMS, DeltaS, Gate, ProjectedOptimizer, arm_named
from assay.vhack.delta.advantage import Shortcut, modify_rewards
from assay.vhack.delta.arms import BASIS_KINDS, GATES, Box
from assay.vhack.delta.controls import make_basis
from tests.vhack.adapter import principal_angles
from tests.vhack.delta.conftest import loss_of, own

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def gradients():
    """Twelve pairs in four groups: a common direction of the hacks, one of the groups, and noise."""
    generator = torch.Generator().manual_seed(2)
    hackward, groups = torch.linalg.qr(torch.randn(40, 5, generator=generator))[0].T.split([1, 4])
    clean = 2 * groups.repeat(3, 1) + 0.1 * torch.randn(12, 40, generator=generator)
    hack = clean + 3 * hackward + 0.2 * torch.randn(12, 40, generator=generator)
    return PairGradients({"a": hack, "b": 2 * hack}, {"a": clean, "b": 2 * clean}, groups=[*"0123"] * 3), hackward[0]


def share(direction, basis):
    """How much of a unit vector lies in the axes of module a."""
    return float((basis.axes["a"] @ direction).norm())


def test_what_each_arm_does():
    assert not ARMS["none"].acts
    assert [name for name, arm in ARMS.items() if arm.gate.kind == "one_sided"] == ["erase-gradient", "erase-update"]
    assert ARMS["erase-update-two-sided"].gate == Gate("two_sided")
    assert ARMS["erase-update-two-sided"].level == "update"
    assert ARMS["box"].box == Box(0.0)
    assert ARMS["constant-push"].push == 0.6
    assert ARMS["trusted-complement"].gate.kind == "keep"
    correct, exploited = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    paid = {name: arm.reward(correct, exploited).tolist() for name, arm in ARMS.items()}
    assert paid.pop("no-loophole") == [1, 0, 0]
    assert paid.pop("ground-truth-penalty") == [1, -1, 0]
    assert all(values == [1, 1, 0] for values in paid.values())
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
def test_distances_that_are_none_are_refused(name):
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


@pytest.mark.parametrize("name", ["erase", "none:random", "box:", "box:other", "trusted-complement:random", ""])
def test_arms_that_there_are_not(name):
    with pytest.raises(UsageError, match="arm"):
        arm_named(name)


def test_the_examples_in_the_docstrings_are_right():
    from assay.vhack.delta import arms as _arms
    from assay.vhack.training import settings as _settings

    for module, examples in ((_arms, 2), (_settings, 2)):
        found = doctest.testmod(module)
        assert (found.failed, found.attempted) == (0, examples)


def test_the_first_word_for_a_two_sided_gate_is_still_read():
    assert Gate("no_gate", 1.5) == Gate("two_sided", 1.5)
    assert "no_gate" not in GATES


@pytest.mark.parametrize("method", ["svd", "lda"])
def test_which_axes_know_the_hack(gradients, method):
    pairs, hackward = gradients
    found = {kind: make_basis(kind, pairs, top_k=2, method=method) for kind in (*BASIS_KINDS, "trusted")}
    assert share(hackward, found["true"]) > 0.9
    assert (share(hackward, found["shuffled"]) > 0.85) == (method == "svd")  # which keeps the plane
    assert all(share(hackward, found[kind]) < 0.5 for kind in ("random", "clean-clean", "trusted"))
    votes = {kind: found[kind].votes["a"][0].tolist() for kind in ("true", "shuffled")}
    assert votes["true"] == [12, 0]
    assert max(votes["shuffled"]) < 12  # the direction is lost
    for basis in found.values():
        assert isinstance(basis, Basis)
        axes = basis.axes["a"]
        assert axes.shape == (2, 40)
        torch.testing.assert_close(axes @ axes.T, torch.eye(2), atol=1e-5, rtol=0)


def test_trusted_axes_are_those_of_the_clean_gradients(gradients):
    pairs, _ = gradients
    basis = make_basis("trusted", pairs, top_k=4)
    right = torch.linalg.svd(pairs.clean["a"].double(), full_matrices=False)[2][:4]
    assert float(principal_angles(basis.axes["a"], right.float()).max()) < 1e-3


def test_controls_follow_their_seed(gradients):
    pairs, _ = gradients
    for kind in ("random", "shuffled", "clean-clean"):
        one, again, other = (make_basis(kind, pairs, seed=seed).axes["a"] for seed in (0, 0, 1))
        assert torch.equal(one, again)
        assert not torch.equal(one, other)


def test_controls_that_cannot_be_made(gradients):
    pairs, _ = gradients
    with pytest.raises(UsageError, match="other axes"):
        make_basis("other", pairs)
    single = PairGradients({"a": torch.ones(1, 3)}, {"a": torch.eye(3)[:1]})
    with pytest.raises(UsageError, match="1 pair"):
        make_basis("clean-clean", single, method="svd")


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


def test_keep_leaves_only_what_lies_along_the_axes(module, ids, small_svd, basis):
    adapter = DeltaS(module, small_svd)
    sgd = torch.optim.SGD(adapter.delta, lr=0.02)
    optimiser = ProjectedOptimizer(sgd, adapter, basis, arm=own(gate=Gate("keep")))
    loss_of(module, ids).backward()
    optimiser.step()
    for name, delta in adapter.values().items():
        if name in basis.axes:
            inside = basis.axes[name].T @ (basis.axes[name] @ delta)
            torch.testing.assert_close(inside, delta, atol=1e-6 * float(delta.norm()), rtol=0)
        assert delta.any()


def encoded(tokenizer, pairs, side):
    return [(tokenizer(p.prompt)["input_ids"], tokenizer(getattr(p, side))["input_ids"]) for p in pairs]


def test_the_scale_is_that_of_the_pairs(small_model, byte_tokenizer, small_pairs):
    shortcut = Shortcut.fit(small_model, byte_tokenizer, small_pairs)
    assert shortcut.layer == 1  # behind two of three layers
    hack, clean = (shortcut.z(small_model, encoded(byte_tokenizer, small_pairs, side)) for side in ("hack", "clean"))
    assert float(hack.mean() + clean.mean()) == pytest.approx(0, abs=1e-3)
    assert float((hack.var() + clean.var()) / 2) == pytest.approx(1, rel=1e-3)
    assert hack.mean() > 0 > clean.mean()


def test_activations_are_means_over_the_completion_behind_the_layer(small_model, module, byte_tokenizer, small_pairs):
    shortcut = Shortcut.fit(small_model, byte_tokenizer, small_pairs)
    prompt, completion = encoded(byte_tokenizer, small_pairs, "hack")[0]
    with torch.no_grad():
        states = module(  # a copy: transformers leaves hooks behind when it is asked for hidden states
            input_ids=torch.tensor([prompt + completion]), output_hidden_states=True, use_cache=False
        ).hidden_states
    mean = states[shortcut.layer + 1][0, len(prompt) :].mean(dim=0)
    wanted = (mean @ shortcut.direction - shortcut.middle) / shortcut.spread
    found = shortcut.z(small_model, encoded(byte_tokenizer, small_pairs, "hack"))[0]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_only_what_is_on_the_side_of_the_hack_is_paid_less():
    z = torch.tensor([-3.0, 0.0, 1e-6, 2.0, 50.0])
    assert modify_rewards(torch.ones(5), z, 2.0).tolist() == pytest.approx(
        [1, 1, 0, 1 - 2 / (1 + 2.718281828**-2), -1], abs=1e-5
    )
    assert modify_rewards(torch.zeros(5), z, 2.0).tolist() == [0] * 5


def test_one_pair_is_no_scale(small_model, byte_tokenizer, small_pairs):
    with pytest.raises(DataError, match="1 pairs"):
        Shortcut.fit(small_model, byte_tokenizer, small_pairs[:1])
