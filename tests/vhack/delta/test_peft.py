"""LoRA of the PEFT library beside δS."""

import pytest
import torch

from assay.errors import UsageError
from assay.vhack import weight_svd
from assay.vhack.delta import DeltaS, Gate, ProjectedOptimizer
from tests.vhack.delta.conftest import loss_of, own, random_basis

peft = pytest.importorskip("peft")


def with_lora(module):
    """The model with LoRA on the attention, as `peft_config=` of a trainer does it: everything else is frozen."""
    return peft.get_peft_model(module, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def test_a_delta_that_peft_has_frozen_is_refused_before_anything_is_lost(module, ids, small_svd, basis):
    adapter = DeltaS(module, small_svd)
    early = ProjectedOptimizer(torch.optim.SGD(adapter.delta, lr=0.5), adapter, basis)
    wrapped = with_lora(module)
    loss_of(wrapped, ids).backward()
    with pytest.raises(UsageError, match="frozen") as caught:
        early.step()
    assert "requires_grad_(True) after get_peft_model" in str(caught.value)
    with pytest.raises(UsageError, match="frozen"):
        ProjectedOptimizer(torch.optim.SGD(adapter.delta, lr=0.5), adapter, basis)


def test_what_the_error_says_to_do_trains_both(module, ids, small_svd, basis):
    adapter = DeltaS(module, small_svd)
    wrapped = with_lora(module)
    adapter.delta.requires_grad_(True)
    lora = [parameter for name, parameter in wrapped.named_parameters() if "lora_B" in name]
    assert lora
    inner = torch.optim.SGD([*adapter.delta, *lora], lr=0.5)
    optimiser = ProjectedOptimizer(inner, adapter, basis)
    first = loss_of(wrapped, ids)
    first.backward()
    optimiser.step()
    assert all(value.any() for value in adapter.values().values())
    assert all(parameter.any() for parameter in lora)
    assert loss_of(wrapped, ids).item() < first.item()


def test_a_delta_attached_to_a_model_with_lora_trains_both(module, ids):
    wrapped = with_lora(module)
    svd = weight_svd(wrapped)
    adapter = DeltaS(wrapped, svd)
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    lora = {name: parameter for name, parameter in trained.items() if "lora_" in name}
    assert lora
    assert trained.keys() - lora.keys() == {f"delta_s.delta.{index}" for index in range(len(adapter.delta))}
    inner = torch.optim.SGD([*adapter.delta, *lora.values()], lr=0.5)
    optimiser = ProjectedOptimizer(inner, adapter, random_basis(svd), arm=own(gate=Gate("two_sided"), level="update"))
    first = loss_of(wrapped, ids)
    first.backward()
    assert all(parameter.grad.any() for parameter in adapter.delta)
    assert all(parameter.grad.any() for name, parameter in lora.items() if "lora_B" in name)
    optimiser.step()
    assert loss_of(wrapped, ids).item() < first.item()
    assert optimiser.measures.as_dict()["leak_two_sided"] < 1e-6
    assert all(value.any() for value in adapter.values().values())
    adapter.detach()
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in wrapped.named_parameters())
