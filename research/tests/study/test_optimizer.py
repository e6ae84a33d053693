"""Every arm, in a stack of all of them, takes the steps that a ProjectedOptimizer takes alone."""

import copy
from functools import partial
from itertools import product

import pytest
import torch
from assay_research.study.optimizer import StackedOptimizer

from assay.vhack.delta import ARMS, Arm, DeltaS, Gate, ProjectedOptimizer, arm_named
from assay.vhack.delta.arms import GATES, Box
from tests.vhack.delta.conftest import random_basis

STEPS = 3
GATING = [name for name, arm in ARMS.items() if not arm.flagged]
NAMES = [*GATING, "erase-gradient+away-0.1", "displaced-0.3+erase-update-two-sided", "displaced-0.2+none"]


def inner(parameters):
    return torch.optim.Adam(parameters, lr=0.03, betas=(0.9, 0.99))


@pytest.fixture(scope="module")
def stack(small, svd):
    """Every arm twice, the axes of some of them others, and the gradients of some steps."""
    arms = [arm_named(name) for name in NAMES for _ in range(2)]
    two = random_basis(svd), random_basis(svd, k=5, seed=1, skip=("model.layers.1.mlp.up_proj",))
    bases = [two[index % 3 == 0] for index in range(len(arms) + 4) if index not in (12, 13, 16, 17)]
    groups = DeltaS(copy.deepcopy(small.module), svd).groups
    optimizer = StackedOptimizer(groups, arms, bases, inner, watched=two[0], max_norm=1.0)
    generator = torch.Generator().manual_seed(6)
    # Drawn for as many arms as there were; a constant push and trusted axes were the seventh and the ninth.
    rows = [row for row in range(len(arms) + 4) if row not in (12, 13, 16, 17)]
    drawn = [
        [torch.randn(len(arms) + 4, *group.values.shape, generator=generator)[rows] for group in groups]
        for _ in range(STEPS)
    ]
    measures = []
    for gradients in drawn:
        optimizer.step([gradient.clone() for gradient in gradients])
        measures.append(optimizer.measures)
    return arms, bases, drawn, optimizer, measures


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_that_of_a_projected_optimizer(small, svd, stack, name):
    arms, bases, drawn, optimizer, measures = stack
    run = next(i for i, arm in enumerate(arms) if arm.name == name)
    adapter = DeltaS(copy.deepcopy(small.module), svd)
    alone = ProjectedOptimizer(inner(list(adapter.delta)), adapter, bases[run], arm=arms[run], max_norm=1.0)
    for step, gradients in enumerate(drawn):
        for parameter, gradient in zip(adapter.delta, gradients, strict=True):
            parameter.grad = gradient[run].clone()
        alone.step()
        for key, value in alone.measures.as_dict().items():
            assert float(measures[step][key][run]) == pytest.approx(value, rel=1e-4, abs=1e-6), key
    for parameter, delta in zip(adapter.delta, optimizer.delta, strict=True):
        torch.testing.assert_close(delta[run], parameter.detach(), rtol=1e-5, atol=1e-6)


OPTIONS = [
    Arm(f"option {index}", "", Gate(kind, 0.8), level, "true", box, start)
    for index, (kind, level, box, start) in enumerate(
        product(GATES, ("gradient", "update"), (None, Box(0.0, 0.02), Box(0.01)), (0.0, 0.25))
    )
]


@pytest.mark.parametrize("level", ["gradient", "update"])
@pytest.mark.parametrize("kind", GATES)
def test_every_combination_of_options_is_that_of_a_projected_optimizer(small, svd, kind, level):
    """Bit by bit: without clipping, whose norm is summed in another order, every number is made in the same way."""
    plain = partial(torch.optim.SGD, lr=0.3, momentum=0.9)
    arms = [arm for arm in OPTIONS if (arm.gate.kind, arm.level) == (kind, level)]
    bases = [random_basis(svd), random_basis(svd, seed=1, skip=("model.layers.1.mlp.up_proj",))]
    chosen = [bases[index % 2] for index in range(len(arms))]
    adapter = DeltaS(copy.deepcopy(small.module), svd)
    stacked = StackedOptimizer(adapter.groups, arms, chosen, plain, max_norm=None)
    generator = torch.Generator().manual_seed(8)
    drawn = [
        [0.1 * torch.randn(len(arms), *group.values.shape, generator=generator) for group in adapter.groups]
        for _ in range(2)
    ]
    for gradients in drawn:
        stacked.step([gradient.clone() for gradient in gradients])
    for run, arm in enumerate(arms):
        with torch.no_grad():
            for parameter in adapter.delta:
                parameter.zero_()
        single = ProjectedOptimizer(plain(list(adapter.delta)), adapter, chosen[run], arm=arm)
        for gradients in drawn:
            for parameter, gradient in zip(adapter.delta, gradients, strict=True):
                parameter.grad = gradient[run].clone()
            single.step()
        for parameter, delta in zip(adapter.delta, stacked.delta, strict=True):
            assert torch.equal(delta[run], parameter.detach()), arm


KNOWN = {
    "none": (-0.162111, 1.182739),
    "no-loophole": (-0.129344, 1.117192),
    "erase-gradient": (1.89037, 1.154913),
    "erase-update": (2.03724, 1.08925),
    "erase-gradient-two-sided": (0.18926, 1.130215),
    "erase-update-two-sided": (0.0, 1.111385),
    "box": (1.15029, 1.120599),
    "advantage-modification": (0.978437, 1.128745),
    "ground-truth-penalty": (0.0792117, 1.205246),
    "erase-gradient+away-0.1": (1.77598, 1.165826),
    "displaced-0.3+erase-update-two-sided": (19.5, 2.651695),
    "displaced-0.2+none": (7.76032, 1.650679),
}
"""Of every named arm with Adam: displacement along its axes and norm of δS after three steps, as the first version."""


def test_named_arms_take_the_steps_of_the_first_version(stack):
    arms, _, _, optimizer, measures = stack
    found = {
        arm.name: (
            float(measures[-1]["displacement"][run]),
            float(torch.cat([delta[run].flatten() for delta in optimizer.delta]).norm()),
        )
        for run, arm in enumerate(arms)
        if run % 2 == 0
    }
    assert found.keys() == KNOWN.keys()
    for name, numbers in KNOWN.items():
        assert found[name] == pytest.approx(numbers, rel=1e-4, abs=1e-6), name
