"""A second δS for flagged rollouts: what it learns, that it is deleted, and that it comes back from
a checkpoint.
"""

import copy

import pytest
import torch

from assay.vhack.directions.delta import DeltaS, ProjectedOptimizer
from assay.vhack.directions.delta.quarantine import Quarantine, shift_baseline
from tests.vhack.delta.conftest import loss_of, own


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=0.02, betas=(0.9, 0.99), weight_decay=0.0)


def made(module, svd):
    adapter = DeltaS(module, svd)
    second = Quarantine(adapter, adam)
    return (
        adapter,
        second,
        ProjectedOptimizer(adam(adapter.delta), adapter, None, arm=own(), quarantine=second),
    )


def train(module, ids, adapter, second, optimizer, steps):
    """Steps in which the last sample is flagged."""
    for step in steps:
        second.begin(step)
        optimizer.zero_grad()
        with adapter.per_sample() as rollouts:
            loss_of(module, ids).backward()
        second.route([rows_MNR[:, -1] for rows_MNR in rollouts.rows])
        optimizer.step()


def test_each_learns_from_its_own_rollouts_alone(module, ids, small_svd):
    """After one step of SGD each δS is that of training on its samples; what is merged is the kept
    one.
    """
    other = copy.deepcopy(module)
    plain = copy.deepcopy(module)
    adapter = DeltaS(module, small_svd)
    make = lambda parameters: torch.optim.SGD(parameters, lr=0.5)  # noqa: E731
    second = Quarantine(adapter, make)
    optimizer = ProjectedOptimizer(make(adapter.delta), adapter, None, arm=own(), quarantine=second)
    train(module, ids, adapter, second, optimizer, [0])
    for chosen, found in ((ids[:-1], adapter.delta), (ids[-1:], second.values)):
        alone = DeltaS(other, small_svd)
        (loss_of(other, chosen) * len(chosen) / len(ids)).backward()
        for parameter, value in zip(alone.delta, found, strict=True):
            torch.testing.assert_close(value.detach(), -0.5 * parameter.grad, rtol=1e-3, atol=1e-6)
        alone.detach()
    kept = adapter.values()
    both = module(input_ids=ids).logits
    second.begin(1)
    assert not torch.equal(module(input_ids=ids).logits, both)
    deployed = module(input_ids=ids).logits
    second.begin(0)
    assert torch.equal(module(input_ids=ids).logits, both)
    merged = adapter.merge()
    torch.testing.assert_close(merged(input_ids=ids).logits, deployed)
    fresh = DeltaS(plain, small_svd)
    with torch.no_grad():
        for parameter, group in zip(fresh.delta, fresh.groups, strict=True):
            parameter.copy_(torch.stack([kept[name] for name in group.names]))
    torch.testing.assert_close(plain(input_ids=ids).logits, deployed)


def test_doubtful_rollouts_train_both(module, ids, small_svd):
    """One step of SGD: the first δS learns from all but the last sample, which is flagged, and the
    second from the last two.
    """
    other = copy.deepcopy(module)
    adapter = DeltaS(module, small_svd)
    make = lambda parameters: torch.optim.SGD(parameters, lr=0.5)  # noqa: E731
    second = Quarantine(adapter, make)
    optimizer = ProjectedOptimizer(make(adapter.delta), adapter, None, arm=own(), quarantine=second)
    second.begin(0)
    with adapter.per_sample() as rollouts:
        loss_of(module, ids).backward()
    second.route(
        [rows_MNR[:, -1] for rows_MNR in rollouts.rows],
        [rows_MNR[:, -2] for rows_MNR in rollouts.rows],
    )
    optimizer.step()
    for learnt, values in ((ids[:-1], adapter.delta), (ids[-2:], second.values)):
        alone = DeltaS(other, small_svd)
        (loss_of(other, learnt) * len(learnt) / len(ids)).backward()
        for parameter, value in zip(alone.delta, values, strict=True):
            torch.testing.assert_close(value.detach(), -0.5 * parameter.grad, rtol=1e-3, atol=1e-6)
        alone.detach()


def test_adam_scales_both_by_the_gradient_of_all_rollouts(module, ids, small_svd):
    adapter, second, optimizer = made(module, small_svd)
    squares = []
    for step in range(3):
        second.begin(step)
        optimizer.zero_grad()
        with adapter.per_sample() as rollouts:
            loss_of(module, ids).backward()
        squares.append([parameter.grad.square() for parameter in adapter.delta])
        second.route([rows_MNR[:, -1] for rows_MNR in rollouts.rows])
        routed = [
            [parameter.grad.square() for parameter in each]
            for each in (adapter.delta, second.values)
        ]
        if step == 0:
            first = routed  # without a state yet, Adam begins with the square of its own part
        optimizer.step()
    for which, (inner, parameters) in enumerate(
        ((optimizer.inner, adapter.delta), (second.inner, second.values))
    ):
        for index, parameter in enumerate(parameters):
            wanted = 0.01 * first[which][index]
            for one in squares[1:]:
                wanted = 0.99 * wanted + 0.01 * one[index]
            torch.testing.assert_close(
                inner.state[parameter]["exp_avg_sq"], wanted, rtol=2e-3, atol=1e-12
            )


def test_it_goes_on_from_a_checkpoint_and_is_in_no_file_of_the_adapter(
    module, ids, small_svd, tmp_path
):
    other = copy.deepcopy(module)
    adapter, second, optimizer = made(module, small_svd)
    train(module, ids, adapter, second, optimizer, [0, 1])
    adapter.save(tmp_path / "delta.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again, renewed, resumed = made(other, small_svd)
    again.load(tmp_path / "delta.safetensors")
    assert not any(value.any() for value in renewed.values)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for each in ((module, adapter, second, optimizer), (other, again, renewed, resumed)):
        train(each[0], ids, *each[1:], [2, 3])
    for mine, theirs in zip(
        [*adapter.delta, *second.values], [*again.delta, *renewed.values], strict=True
    ):
        assert torch.equal(mine, theirs)


def test_flagged_rollouts_are_in_no_baseline():
    rewards = torch.tensor([1.0, 0.0, 2.0, 3.0, 1.0, 5.0])
    flags = torch.tensor([False, False, True, True, True, True])
    advantages = (
        rewards
        - rewards.view(2, 3).mean(dim=1).repeat_interleave(3)
        + shift_baseline(rewards, flags, 3)
    )
    assert advantages.tolist() == pytest.approx([0.5, -0.5, 1.5, 0.0, -2.0, 2.0])


def test_gradients_that_cancel_leave_every_number_finite(module, small_svd):
    """Rounding made a second moment negative where flagged rollouts undo what the others teach."""
    adapter, second, optimizer = made(module, small_svd)
    torch.manual_seed(0)
    for size in (1e-6, 1.0):
        grads = [size * torch.randn_like(value) for value in second.values]
        for kept, value, grad_MR in zip(adapter.delta, second.values, grads, strict=True):
            kept.grad = grad_MR.clone()
            value.grad = -grad_MR
        optimizer.step()
    assert all(torch.isfinite(value).all() for value in (*adapter.delta, *second.values))
