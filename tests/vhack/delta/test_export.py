"""What others are given of δS: plain weights after every step; and LoRA, which no gate holds back,
is refused.
"""

import pytest
import torch

from assay.errors import UsageError
from assay.vhack import weight_svd
from assay.vhack.directions.delta import DeltaS, ProjectedOptimizer
from tests.vhack.delta.conftest import Engine, loss_of, own, random_basis, randomise
from tests.wordings import refuses


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_after_every_step_the_engine_has_the_merged_weights_bit_by_bit(module, ids, dtype):
    module = module.to(getattr(torch, dtype))
    engine = Engine(module)
    svd = weight_svd(module)
    adapter = DeltaS(module, svd)
    inner = torch.optim.AdamW(adapter.delta, lr=0.02)
    optimiser = ProjectedOptimizer(inner, adapter, random_basis(svd), arm=own())
    before = [parameter.detach().clone() for parameter in engine.parameters.values()]
    for _ in range(3):
        optimiser.zero_grad()
        loss_of(module, ids).backward()
        optimiser.step()
        inside = [parameter.detach().clone() for parameter in module.parameters()]
        engine.load_weights(adapter.weights())
        for mine, kept in zip(module.parameters(), inside, strict=True):
            assert torch.equal(mine, kept)
        for group in adapter.groups:
            for linear, name in zip(group.linears, group.names, strict=True):
                assert torch.equal(engine.parameters[f"{name}.weight"], linear.weight)
    assert engine.loads == [len(before)] * 3
    assert not all(map(torch.equal, before, engine.parameters.values()))
    wanted = dict(adapter.merge().named_parameters())
    assert wanted.keys() == engine.parameters.keys()
    for name, weight in wanted.items():
        assert torch.equal(engine.parameters[name], weight), name


def test_weights_follow_a_delta_that_was_changed_behind_the_back_of_the_adapter(module, small_svd):
    adapter = DeltaS(module, small_svd)
    engine = Engine(module.model.layers[0].mlp.up_proj)
    randomise(adapter)
    found = dict(adapter.weights())
    assert not torch.equal(found["model.layers.0.mlp.up_proj.weight"], engine.parameters["weight"])
    assert not any("delta_s" in name for name in found)


def with_lora(module):
    """The model with LoRA on the attention, as `peft_config=` of a trainer does it: everything else
    is frozen.
    """
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(module, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def test_lora_beside_delta_is_refused_whichever_was_there_first(module, small_svd, basis):
    adapter = DeltaS(module, small_svd)
    early = ProjectedOptimizer(torch.optim.SGD(adapter.delta, lr=0.5), adapter, basis, arm=own())
    wrapped = with_lora(module)
    with refuses(UsageError, "lora beside delta is refused whichever was there first"):
        early.step()
    with refuses(UsageError, "lora beside delta is refused whichever was there first"):
        ProjectedOptimizer(torch.optim.SGD(adapter.delta, lr=0.5), adapter, basis, arm=own())
    adapter.detach()
    with refuses(UsageError, "lora beside delta is refused whichever was there first, 2"):
        DeltaS(wrapped)
