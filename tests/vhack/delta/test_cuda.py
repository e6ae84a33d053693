"""The adapter and the gates on a GPU."""

import copy

import pytest
import torch
from assay_research.arms import Gate

from assay.models import load_model
from assay.vhack import weight_svd
from assay.vhack.directions.delta import DeltaS, ProjectedOptimizer
from tests.vhack.delta.conftest import gradients_of, loss_of, own, random_basis, randomise
from tests.vhack.delta.test_delta import written_out

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 4096, (4, 300), generator=torch.Generator().manual_seed(5)).to(DEVICE)


def load(dtype):
    return load_model("reference:qwen3", dtype=dtype, device=DEVICE).module


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_identity_detach_and_disabled_are_exact(ids, dtype):
    module = load(dtype)
    weights = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        reference = module(input_ids=ids, use_cache=False).logits
        adapter = DeltaS(module)
        adapter.refresh()
        assert torch.equal(module(input_ids=ids, use_cache=False).logits, reference)
        randomise(adapter)
        assert not torch.equal(module(input_ids=ids, use_cache=False).logits, reference)
        with adapter.disabled():
            assert torch.equal(module(input_ids=ids, use_cache=False).logits, reference)
    adapter.detach()
    assert all(torch.equal(weights[name], value) for name, value in module.state_dict().items())


def test_the_gradient_is_that_of_the_formula_written_out(ids):
    module = load("float32")
    plain = load("float32")
    adapter = DeltaS(module)
    randomise(adapter, scale=0.01)
    loss_of(module, ids).backward()
    delta = {name: value.clone().requires_grad_() for name, value in adapter.values().items()}
    written_out(plain, ids, adapter.svd, delta).backward()
    found = gradients_of(adapter)
    assert all(
        (found[name] - value.grad).norm() < 1e-2 * value.grad.norm()
        for name, value in delta.items()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_is_exactly_outside_the_axes(ids, dtype):
    module = load(dtype)
    svd = weight_svd(module)
    adapter = DeltaS(module, svd)
    inner = torch.optim.AdamW(adapter.delta, lr=0.01, fused=True)
    optimiser = ProjectedOptimizer(
        inner, adapter, random_basis(svd), arm=own(gate=Gate("two_sided"), level="update")
    )
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        loss = loss_of(module, ids)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        assert optimiser.measures.as_dict()["leak_two_sided"] <= 1e-6
    assert losses[-1] < losses[0]
