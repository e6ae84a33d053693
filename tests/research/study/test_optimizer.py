"""Every arm, in a stack of all of them, takes the steps that a ProjectedOptimizer takes alone."""

import copy

import pytest
import torch

from assay.research.study._optimizer import StackedOptimizer
from assay.vhack.delta import ARMS, DeltaS, ProjectedOptimizer, arm_named
from tests.vhack.delta.conftest import random_basis

STEPS = 3
NAMES = [*ARMS, "erase-gradient+away-0.1", "displaced-0.3+erase-update-two-sided", "displaced-0.2+none"]
INNER = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.03, betas=(0.9, 0.99)),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.9),
}


@pytest.fixture(scope="module")
def stack(small, svd):
    """All arms with both optimisers, the axes of half of them others, and the gradients of some steps."""
    arms = [arm_named(name) for name in NAMES for _ in INNER]
    kinds = [kind for _ in NAMES for kind in INNER]
    two = random_basis(svd), random_basis(svd, k=5, seed=1, skip=("model.layers.1.mlp.up_proj",))
    bases = [two[index % 3 == 0] for index in range(len(arms))]
    groups = DeltaS(copy.deepcopy(small.module), svd).groups
    optimizer = StackedOptimizer(groups, arms, bases, kinds, INNER, watched=two[0], max_norm=1.0)
    generator = torch.Generator().manual_seed(6)
    drawn = [
        [torch.randn(len(arms), *group.values.shape, generator=generator) for group in groups] for _ in range(STEPS)
    ]
    measures = []
    for gradients in drawn:
        optimizer.step([gradient.clone() for gradient in gradients])
        measures.append(optimizer.measures)
    return arms, kinds, bases, drawn, optimizer, measures


@pytest.mark.parametrize("kind", list(INNER))
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_that_of_a_projected_optimizer(small, svd, stack, name, kind):
    arms, kinds, bases, drawn, optimizer, measures = stack
    run = next(i for i, arm in enumerate(arms) if arm.name == name and kinds[i] == kind)
    arm, adapter = arms[run], DeltaS(copy.deepcopy(small.module), svd)
    alone = ProjectedOptimizer(
        INNER[kind](list(adapter.delta)),
        adapter,
        bases[run],
        gate=arm.gate,
        level=arm.level,
        box=arm.box,
        push=arm.push,
        max_norm=1.0,
    )
    alone.displace(arm.start)
    for step, gradients in enumerate(drawn):
        for parameter, gradient in zip(adapter.delta, gradients, strict=True):
            parameter.grad = gradient[run].clone()
        alone.step()
        for key, value in alone.measures.as_dict().items():
            assert float(measures[step][key][run]) == pytest.approx(value, rel=1e-4, abs=1e-6), key
    for parameter, delta in zip(adapter.delta, optimizer.delta, strict=True):
        torch.testing.assert_close(delta[run], parameter.detach(), rtol=1e-5, atol=1e-6)


def test_a_state_goes_on_as_before(small, svd, stack):
    arms, kinds, bases, drawn, optimizer, _ = stack
    groups = DeltaS(copy.deepcopy(small.module), svd).groups
    other = StackedOptimizer(groups, arms, bases, kinds, INNER)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again = StackedOptimizer(groups, arms, bases, kinds, INNER)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for made in (other, again):
        made.step([gradient.clone() for gradient in drawn[0]])
    for one, two, old in zip(other.delta, again.delta, optimizer.delta, strict=True):
        assert torch.equal(one, two)
        assert not torch.equal(one, old)
