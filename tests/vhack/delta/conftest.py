"""A small model of its own for every test, since adapters change it, and axes that fit it."""

import copy

import pytest
import torch
from assay_research.arms import AxisArm, Gate

from assay.vhack import Basis
from assay.vhack.directions.delta import DeltaS, ProjectedOptimizer


@pytest.fixture
def module(small_model):
    """A copy of the small model, float32, with weights that can be trained, whatever another test
    has frozen.
    """
    return copy.deepcopy(small_model.module).requires_grad_(True)


@pytest.fixture(scope="session")
def ids():
    """Three rows of tokens."""
    return torch.randint(0, 512, (3, 24), generator=torch.Generator().manual_seed(5))


class Engine:
    """What vLLM is to a trainer: a plain model with names of its own, which loads what it knows and
    nothing else.
    """

    def __init__(self, module):
        self.parameters = dict(copy.deepcopy(module).named_parameters())
        self.loads = []  # number of weights each time

    @torch.no_grad()
    def load_weights(self, weights):
        self.loads.append(0)
        for name, weight in weights:
            self.parameters[name].copy_(weight)
            self.loads[-1] += 1


def random_basis(svd, k=3, seed=0, skip=()):
    """Orthonormal axes of every module, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    axes = {
        name: torch.linalg.qr(torch.randn(factors.rank, k, generator=generator))[0].T.contiguous()
        for name, factors in svd.items()
        if name not in skip
    }
    values = {name: torch.linspace(2, 1, k) for name in axes}
    votes = {name: torch.tensor([[3, 1]] * k) for name in axes}
    return Basis(axes, values, votes)


@pytest.fixture(scope="session")
def basis(small_svd):
    """Three axes for every module but one."""
    return random_basis(small_svd, skip=("model.layers.1.mlp.up_proj",))


def loss_of(module, ids):
    """Mean negative log-likelihood of all tokens."""
    logits = module(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def gradients_of(adapter):
    """The gradient of every module's δS, by its name."""
    parts = zip(adapter.delta, adapter.groups, strict=True)
    return {name: row for p, group in parts for name, row in zip(group.names, p.grad, strict=True)}


def randomise(adapter, scale=0.05, seed=1):
    """Some δS that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.delta:
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


OPTIMISERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02),
}


ONE_SIDED = Gate("one_sided")


def own(gate=ONE_SIDED, **others):
    """An arm of a test's own."""
    return AxisArm("own", "", gate=gate, **others)


def build(module, svd, basis, kind="adamw", **settings):
    """Return an adapter and its projected optimiser."""
    adapter = DeltaS(module, svd)
    settings.setdefault("arm", own())
    return adapter, ProjectedOptimizer(OPTIMISERS[kind](adapter.delta), adapter, basis, **settings)


def backward(module, ids, optimiser):
    """Leave new gradients, and return the loss."""
    optimiser.zero_grad()
    loss = loss_of(module, ids)
    loss.backward()
    return loss.item()
