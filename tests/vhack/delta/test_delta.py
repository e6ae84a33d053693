import copy

import pytest
import torch
from torch.nn import functional

from assay.errors import ModelError, UsageError
from assay.vhack import per_sample_gradients, target_modules, weight_svd
from assay.vhack.directions.delta import DeltaS
from tests.vhack.delta.conftest import gradients_of, loss_of, randomise
from tests.wordings import refuses


def logits(module, ids):
    with torch.no_grad():
        return module(input_ids=ids, use_cache=False).logits


def hooks_of(module):
    return [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()]


@pytest.fixture
def adapter(module, small_svd):
    """A δS that is not zero."""
    made = DeltaS(module, small_svd)
    randomise(made)
    return made


@pytest.fixture
def reference(small_model, ids):
    """What the model says without δS."""
    return logits(small_model.module, ids)


def gradients(module, adapter, ids):
    """Of a backward pass from no gradients at all."""
    module.zero_grad()
    loss_of(module, ids).backward()
    return [parameter.grad.clone() for parameter in adapter.delta]


def written_out(module, ids, svd, delta):
    """The loss with W + U diag(δS) Vh in place of every W, by functional_call: plain autograd,
    without the adapter.
    """
    weights = {
        name + ".weight": linear.weight.detach() + (svd[name].left * delta[name]) @ svd[name].right
        for name, linear in target_modules(module).items()
    }
    output = torch.func.functional_call(module, weights, (), {"input_ids": ids, "use_cache": False})
    flat = output.logits[:, :-1].flatten(0, 1)
    return functional.cross_entropy(flat, ids[:, 1:].flatten())


def test_at_zero_the_model_is_the_same_bit_by_bit(module, ids, small_svd):
    with torch.no_grad():
        module.model.layers[0].mlp.up_proj.weight[0, 0] = -0.0  # whose sign a sum with 0 would lose
    before = logits(module, ids)
    weights = copy.deepcopy(module.state_dict())
    adapter = DeltaS(module, small_svd)
    adapter.refresh()
    assert torch.equal(logits(module, ids).view(torch.int32), before.view(torch.int32))
    assert all(
        torch.equal(weights[n].view(torch.int32), module.state_dict()[n].view(torch.int32))
        for n in weights
    )


@pytest.mark.parametrize("tokens", [4, 24, 120])
def test_gradient_and_loss_are_those_of_the_formula_written_out(
    module, small_model, small_svd, adapter, tokens
):
    """In both orders of the sum: with few tokens each is projected, with many the outer product is
    formed first.
    """
    ids = torch.randint(0, 512, (1, tokens), generator=torch.Generator().manual_seed(2))
    loss = loss_of(module, ids)
    loss.backward()
    delta = {name: value.clone().requires_grad_() for name, value in adapter.values().items()}
    wanted = written_out(small_model.module, ids, small_svd, delta)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for name, row in gradients_of(adapter).items():
        torch.testing.assert_close(
            row, delta[name].grad, rtol=2e-4, atol=2e-6 * float(delta[name].grad.norm())
        )


@pytest.mark.parametrize("tokens", [4, 120])
def test_gradients_of_kinds_of_samples_are_sums_of_theirs(module, adapter, tokens):
    """In both orders of the sum; one kind has no sample, one has all in the second pass, and one
    has samples of others: the gradient of the parameters still counts each once.
    """
    ids = torch.randint(0, 512, (3, tokens), generator=torch.Generator().manual_seed(7))
    with adapter.per_sample() as single:
        loss_of(module, ids).backward()
    wanted = [parameter.grad.clone() for parameter in adapter.delta]
    module.zero_grad()
    masks = (
        [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]],
        [[0, 0, 0], [1, 1, 1], [0, 0, 0], [1, 0, 1]],
    )
    with adapter.per_sample() as found:
        for each in masks:
            found.kinds = torch.tensor(each).float()
            loss_of(module, ids).backward()
    for rows, kinds, parameter, gradient in zip(
        single.rows, found.rows, adapter.delta, wanted, strict=True
    ):
        pair = rows[:, [0, 2]].sum(1)
        parts = [pair, 0 * rows[:, 0], rows[:, 1], rows.sum(1)]
        whole = [0 * rows[:, 0], rows.sum(1), 0 * rows[:, 0], pair]
        scale = float(rows.norm())
        torch.testing.assert_close(
            kinds, torch.stack(parts + whole, dim=1), rtol=1e-4, atol=1e-5 * scale
        )
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-4, atol=1e-5 * scale)


def test_bfloat16_gradients_are_as_good_as_bfloat16_can_be(module, ids):
    plain = copy.deepcopy(module)
    half = module.to(torch.bfloat16)
    adapter = DeltaS(half, weight_svd(half, dtype="bfloat16"))
    loss_of(half, ids).backward()
    delta = {name: torch.zeros(f.rank, requires_grad=True) for name, f in adapter.svd.items()}
    exact = weight_svd(half, dtype="float32")
    written_out(plain.to(torch.bfloat16).float(), ids, exact, delta).backward()
    wide = {name: value.grad for name, value in delta.items()}
    found = gradients_of(adapter)
    # Singular vectors of either sign give the same product, so coordinates are comparable.
    total = sum(float((found[n] - wide[n]).norm() ** 2) for n in wide) / sum(
        float(wide[n].norm() ** 2) for n in wide
    )
    assert total**0.5 < 0.1
    assert all(parameter.grad.dtype == torch.float32 for parameter in adapter.delta)


def test_merging_many_times_accumulates_no_rounding(module):
    half = module.to(torch.bfloat16)
    adapter = DeltaS(half, weight_svd(half))
    before = copy.deepcopy(half.state_dict())
    for seed in range(20):
        randomise(adapter, seed=seed)
        adapter.refresh()
    with torch.no_grad():
        for parameter in adapter.delta:
            parameter.zero_()
    adapter.refresh()
    after = half.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_step_of_any_optimiser_is_merged_before_the_next_forward_pass(module, ids, small_svd):
    adapter = DeltaS(module, small_svd)
    optimiser = torch.optim.SGD(adapter.delta, lr=1.0)
    first = loss_of(module, ids)
    first.backward()
    optimiser.step()
    assert loss_of(module, ids).item() < first.item()
    linear = module.model.layers[0].self_attn.q_proj
    factors = small_svd["model.layers.0.self_attn.q_proj"]
    delta = adapter.values()["model.layers.0.self_attn.q_proj"]
    change = linear.weight - adapter.groups[0].base[0]
    torch.testing.assert_close(change, (factors.left * delta) @ factors.right, rtol=1e-4, atol=1e-6)


def test_disabled_is_the_reference_policy_and_leaves_a_backward_pass_right(
    module, ids, reference, adapter
):
    trained = logits(module, ids)
    wanted = gradients(module, adapter, ids)
    module.zero_grad()
    loss = loss_of(module, ids)
    with adapter.disabled():
        assert torch.equal(logits(module, ids), reference)
        with adapter.disabled():
            assert torch.equal(logits(module, ids), reference)
    with pytest.raises(ValueError, match="tokens"), adapter.disabled():
        raise ValueError("no more tokens")
    assert torch.equal(logits(module, ids), trained)
    loss.backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(adapter.delta, wanted, strict=True))


def test_a_step_inside_disabled_leaves_the_reference_alone(module, ids, small_svd, reference):
    adapter = DeltaS(module, small_svd)
    with adapter.disabled():
        randomise(adapter)
        adapter.refresh()
        assert torch.equal(logits(module, ids), reference)
    assert not torch.equal(logits(module, ids), reference)
    with adapter.disabled():
        assert torch.equal(logits(module, ids), reference)


def test_detach_leaves_nothing_behind(module, ids, small_svd):
    weights = copy.deepcopy(module.state_dict())
    before = logits(module, ids)
    hooks = hooks_of(module)
    adapter = DeltaS(module, small_svd)
    randomise(adapter)
    loss_of(module, ids).backward()
    adapter.detach()
    assert torch.equal(logits(module, ids), before)
    assert module.state_dict().keys() == weights.keys()
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert hooks_of(module) == hooks
    DeltaS(module, small_svd)


@pytest.mark.parametrize("name", ["detach", "merge"])
def test_an_adapter_does_not_leave_while_it_is_disabled(module, ids, reference, adapter, name):
    """The end of the block would put weights back that no longer belong to the model."""
    with adapter.disabled(), pytest.raises(UsageError, match=rf"{name} inside disabled\(\)"):
        getattr(adapter, name)()
    adapter.detach()
    assert torch.equal(logits(module, ids), reference)


def test_generation_merges_a_step_and_runs_on_plain_weights(module, ids, adapter):
    linear = module.model.layers[0].mlp.up_proj
    stored = linear.weight.clone()
    out = module.generate(ids[:, :8], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert not torch.equal(stored, linear.weight)
    greedy = ids[:, :8]
    for _ in range(4):
        greedy = torch.cat([greedy, logits(module, greedy)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, greedy)


def test_gradient_checkpointing_gives_the_same_gradient_and_autocast_nearly(module, ids, adapter):
    module.train()
    wanted = gradients(module, adapter, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for found, grad in zip(gradients(module, adapter, ids), wanted, strict=True):
            assert (found - grad).norm() < 0.05 * grad.norm()
    form = (
        "activation" if hasattr(module, "activation_checkpointing_enable") else "gradient"
    )  # up to transformers 5.23
    getattr(module, f"{form}_checkpointing_enable")(
        **{f"{form}_checkpointing_kwargs": {"use_reentrant": False}}
    )
    for found, grad in zip(gradients(module, adapter, ids), wanted, strict=True):
        torch.testing.assert_close(found, grad)


def test_what_does_not_fit_is_refused(module, small_svd):
    adapter = DeltaS(module)
    with refuses(UsageError, "what does not fit is refused"):
        DeltaS(module)
    adapter.detach()
    svd = weight_svd(module)
    del svd["model.layers.0.mlp.up_proj"]
    with refuses(UsageError, "what does not fit is refused, 2"):
        DeltaS(module, svd)


def test_packed_inputs_have_no_gradients_of_single_samples(module, ids, small_svd):
    adapter = DeltaS(module, small_svd)
    linear = module.model.layers[0].mlp.up_proj
    loss_of(module, ids)
    with (
        adapter.per_sample(),
        refuses(ModelError, "packed inputs have no gradients of single samples"),
    ):
        linear(torch.randn(5, 64))


def test_extraction_on_an_adapted_model_gives_the_gradients_of_its_deltas(
    module, adapter, byte_tokenizer, samples
):
    """A basis renewed during training is in the coordinates of the start, at the weights of now."""
    rows = []
    for sample in samples:
        prompt, completion = (
            byte_tokenizer(text)["input_ids"] for text in (sample.prompt, sample.completion)
        )
        with adapter.per_sample() as rollouts:
            logits = module(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits
            functional.cross_entropy(
                logits[0, len(prompt) - 1 : -1], torch.tensor(completion)
            ).backward()
        rows.append(rollouts.rows)
    before = [parameter.grad.clone() for parameter in adapter.delta]
    found = per_sample_gradients(samples, module, tokenizer=byte_tokenizer, svd=adapter.svd)
    for index, group in enumerate(adapter.groups):
        for m, name in enumerate(group.names):
            wanted = torch.stack([row[index][m, 0] for row in rows])
            assert (found[name] - wanted).norm() < 1e-3 * wanted.norm()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(adapter.delta, before, strict=True))
    assert all(parameter.requires_grad for parameter in adapter.delta)
