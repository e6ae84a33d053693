"""Runs side by side are what each run is alone, with the adapter and the optimiser of the training package."""

import copy

import pytest
import torch
from assay_research.study.model import Batch, Generator, StackedModel, policy_gradient, token_logprobs

from assay.vhack.delta import DeltaS

R, P, G, L, T = 3, 2, 2, 9, 6
END, LAST = 2, 201


@pytest.fixture(scope="module")
def stacked(small, svd):
    model = StackedModel(small, R, svd)
    generator = torch.Generator().manual_seed(3)
    delta = [0.4 * torch.randn(R, *group.values.shape, generator=generator) for group in model.groups]
    model.merge(delta)
    return model, delta


@pytest.fixture(scope="module")
def batch(stacked):
    model, _ = stacked
    generator = torch.Generator().manual_seed(4)
    ids_RPL = torch.randint(3, 4000, (R, P, L), generator=generator)
    lengths_RP = torch.randint(3, L + 1, (R, P), generator=generator)
    uniform_TRPG = torch.rand(T, R, P, G, generator=generator)
    tokens = Generator(model, (P, G, L, T), END).sample(ids_RPL, lengths_RP, LAST, uniform_TRPG)
    tokens[0, 0, 0, 3:] = END
    return Batch(ids_RPL, lengths_RP, LAST, tokens, END), uniform_TRPG


def alone(small, svd, delta, run):
    """The model with the δS of one run."""
    module = copy.deepcopy(small.module)
    adapter = DeltaS(module, svd)
    with torch.no_grad():
        for parameter, delta_RMC in zip(adapter.delta, delta, strict=True):
            parameter.copy_(delta_RMC[run])
    return module, adapter


def logprobs_of(module, batch, run, prompt, rollout):
    """Of one rollout, by one plain forward pass, [T, V]."""
    n = int(batch.lengths[run, prompt])
    ids = torch.cat([batch.ids[run, prompt, :n], torch.tensor([LAST]), batch.tokens[run, prompt, rollout]])
    return module(input_ids=ids[None]).logits[0, n : n + T].log_softmax(-1)


def test_log_probabilities_and_gradients_are_those_of_the_adapter(small, svd, stacked, batch):
    model, delta = stacked
    rollouts, _ = batch
    advantages_RPG = torch.randn(R, P, G, generator=torch.Generator().manual_seed(5))
    found = token_logprobs(model, rollouts)
    gradients = policy_gradient(model, rollouts, advantages_RPG)
    for run in range(R):
        module, adapter = alone(small, svd, delta, run)
        loss = torch.zeros(())
        for p in range(P):
            for g in range(G):
                tokens, mask = rollouts.tokens[run, p, g], rollouts.mask[run, p, g]
                wanted = logprobs_of(module, rollouts, run, p, g).gather(1, tokens[:, None])[:, 0] * mask
                torch.testing.assert_close(found[run, p, g], wanted.detach(), rtol=1e-4, atol=1e-4)
                loss = loss - advantages_RPG[run, p, g] * wanted.sum() / (P * G)
        loss.backward()
        for parameter, gradient in zip(adapter.delta, gradients, strict=True):
            torch.testing.assert_close(gradient[run], parameter.grad, rtol=1e-3, atol=1e-4)


def test_tokens_are_drawn_from_the_policy_with_the_numbers_given(small, svd, stacked, batch):
    _, delta = stacked
    rollouts, uniform_TRPG = batch
    module, _ = alone(small, svd, delta, 1)
    for p in range(P):
        for g in range(G):
            below = logprobs_of(module, rollouts, 1, p, g).detach().exp().cumsum(-1)
            drawn = (below <= uniform_TRPG[:, 1, p, g, None] * below[:, -1:]).sum(-1)
            mask = rollouts.mask[1, p, g]
            assert torch.equal(drawn[mask], rollouts.tokens[1, p, g][mask])


def test_a_run_in_a_group_writes_and_learns_what_it_does_alone(small, svd, stacked, batch):
    model, delta = stacked
    rollouts, uniform_TRPG = batch
    single = StackedModel(small, 1, svd)
    single.merge([delta_RMC[2:] for delta_RMC in delta])
    tokens = Generator(single, (P, G, L, T), END).sample(
        rollouts.ids[2:], rollouts.lengths[2:], LAST, uniform_TRPG[:, 2:]
    )
    assert torch.equal(tokens, rollouts.tokens[2:])
    advantages_RPG = torch.randn(R, P, G)
    both = policy_gradient(model, rollouts, advantages_RPG)
    own = policy_gradient(single, rollouts.of_runs(torch.tensor([2])), advantages_RPG[2:])
    for many, one in zip(both, own, strict=True):
        torch.testing.assert_close(many[2:], one, rtol=1e-4, atol=1e-5)
    some = policy_gradient(model.some(torch.tensor([2])), rollouts.of_runs(torch.tensor([2])), advantages_RPG[2:])
    for part, one in zip(some, own, strict=True):
        torch.testing.assert_close(part, one, rtol=1e-4, atol=1e-5)
