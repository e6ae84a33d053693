"""What others are given of δS: plain weights after every step, and LoRA with its error."""

import copy
import json

import pytest
import torch
from safetensors import safe_open

from assay.errors import ModelError, UsageError
from assay.vhack import weight_svd
from assay.vhack.delta import DeltaS, Gate, ProjectedOptimizer
from tests.vhack.delta.conftest import Engine, loss_of, own, random_basis, randomise

peft = pytest.importorskip("peft")


def with_lora(module):
    targets = ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)  # so that B is not zero
    torch.manual_seed(4)
    return peft.get_peft_model(module, config)


def plain_state(adapter):
    """The weights of a plain model, made the long way: merge δS for good, then LoRA."""
    merged = adapter.merge()
    merged = merged.merge_and_unload() if hasattr(merged, "merge_and_unload") else merged
    return dict(merged.named_parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [False, True])
def test_after_every_step_the_engine_has_the_merged_weights_bit_by_bit(module, ids, lora, dtype):
    module = module.to(getattr(torch, dtype))
    engine = Engine(module)
    wrapped = with_lora(module) if lora else module
    svd = weight_svd(wrapped)
    adapter = DeltaS(wrapped, svd)
    trained = [p for name, p in wrapped.named_parameters() if "lora_" in name]
    inner = torch.optim.AdamW([*adapter.delta, *trained], lr=0.02)
    optimiser = ProjectedOptimizer(inner, adapter, random_basis(svd))
    before = [parameter.detach().clone() for parameter in engine.parameters.values()]
    for _ in range(3):
        optimiser.zero_grad()
        loss_of(wrapped, ids).backward()
        optimiser.step()
        inside = [parameter.detach().clone() for parameter in wrapped.parameters()]
        engine.load_weights(adapter.weights())
        for mine, kept in zip(wrapped.parameters(), inside, strict=True):
            assert torch.equal(mine, kept)
        for group in adapter.groups if not lora else ():
            for linear, name in zip(group.linears, group.names, strict=True):
                assert torch.equal(engine.parameters[f"{name}.weight"], linear.weight)
    assert engine.loads == [len(before)] * 3
    assert not all(map(torch.equal, before, engine.parameters.values()))
    wanted = plain_state(adapter)
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


def test_what_has_no_plain_weights_is_refused(module, small_svd):
    wrapped = with_lora(module)
    adapter = DeltaS(wrapped)
    wrapped.merge_adapter()
    with pytest.raises(ModelError, match="merged with its LoRA already"):
        list(adapter.weights())


def test_delta_as_lora_of_full_rank_is_the_merged_model(module, ids, small_svd, tmp_path):
    plain = copy.deepcopy(module)
    adapter = DeltaS(module, small_svd)
    randomise(adapter)
    made = adapter.save_lora(tmp_path, 64)
    assert made.error == 0.0
    lora = peft.PeftModel.from_pretrained(plain, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(lora(input_ids=ids).logits, module(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 5, 40, 80])
def test_the_error_of_lora_is_measured_and_is_that_of_no_better_matrix(module, small_svd, tmp_path, rank):
    adapter = DeltaS(module, small_svd)
    randomise(adapter)
    with torch.no_grad():
        adapter.delta[0][0].zero_()  # the error of a matrix that stays as it was is 0
    made = adapter.save_lora(tmp_path, rank)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as reader:
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
        assert float(reader.metadata()["relative_error"]) == made.error
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == rank
    errors, sizes = [], []
    for name, delta in adapter.values().items():
        factors = small_svd[name]
        change = ((factors.left * delta) @ factors.right).double()
        pair = [tensors[f"base_model.model.{name}.lora_{which}.weight"].double() for which in "BA"]
        missing, size = float((change - pair[0] @ pair[1]).norm()), float(change.norm())
        least = float(torch.linalg.svdvals(change)[rank:].norm())
        assert missing == pytest.approx(least, abs=1e-6 * (size + 1))
        assert made.errors[name] == pytest.approx(missing / size if size else 0.0, abs=1e-6)
        errors.append(missing**2)
        sizes.append(size**2)
    assert made.error == pytest.approx((sum(errors) / sum(sizes)) ** 0.5, abs=1e-6)
    assert made.errors[made.worst] == max(made.errors.values())


def with_new_lora(module):
    """The model with LoRA on the attention, as `peft_config=` of a trainer does it: everything else is frozen."""
    return peft.get_peft_model(module, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def test_a_delta_that_peft_has_frozen_is_refused_before_anything_is_lost(module, ids, small_svd, basis):
    adapter = DeltaS(module, small_svd)
    early = ProjectedOptimizer(torch.optim.SGD(adapter.delta, lr=0.5), adapter, basis)
    wrapped = with_new_lora(module)
    loss_of(wrapped, ids).backward()
    with pytest.raises(UsageError, match="frozen") as caught:
        early.step()
    assert "requires_grad_(True) after get_peft_model" in str(caught.value)
    with pytest.raises(UsageError, match="frozen"):
        ProjectedOptimizer(torch.optim.SGD(adapter.delta, lr=0.5), adapter, basis)


@pytest.mark.parametrize("first", ["delta", "lora"])
def test_delta_and_lora_are_trained_together_whichever_was_there_first(module, ids, first):
    if first == "delta":
        adapter = DeltaS(module)
        wrapped = with_new_lora(module)
        adapter.delta.requires_grad_(True)  # as the error says
    else:
        wrapped = with_new_lora(module)
        adapter = DeltaS(wrapped)
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    lora = {name: parameter for name, parameter in trained.items() if "lora_" in name}
    assert lora
    assert {id(p) for p in trained.values()} - {id(p) for p in lora.values()} == {id(p) for p in adapter.delta}
    inner = torch.optim.SGD([*adapter.delta, *lora.values()], lr=0.5)
    arm = own(gate=Gate("two_sided"), level="update")
    optimiser = ProjectedOptimizer(inner, adapter, random_basis(adapter.svd), arm=arm)
    before = loss_of(wrapped, ids)
    before.backward()
    assert all(parameter.grad.any() for parameter in adapter.delta)
    assert all(parameter.grad.any() for name, parameter in lora.items() if "lora_B" in name)
    optimiser.step()
    assert loss_of(wrapped, ids).item() < before.item()
    assert optimiser.measures.as_dict()["leak_two_sided"] < 1e-6
    assert all(value.any() for value in adapter.values().values())
    adapter.detach()
    kept = "lora_" if first == "lora" else ""  # what could be trained when δS was attached
    assert all(parameter.requires_grad == (kept in name) for name, parameter in wrapped.named_parameters())
