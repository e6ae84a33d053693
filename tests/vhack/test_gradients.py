"""Gradients of many samples from one backward pass, against one sample at a time through the
adapter.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from assay.errors import DataError, ModelError, OutOfMemory, UsageError
from assay.models import load_model
from assay.vhack import (
    Sample,
    SampleGradients,
    per_sample_gradients,
    target_modules,
    weight_svd,
    weights_digest,
)
from assay.vhack.directions.delta import DeltaS
from assay.vhack.directions.gradients.batches import (
    Encoded,
    encode,
    plan_batches,
    room_for_batches,
    token_budget,
)
from assay.vhack.directions.gradients.gradient_operations import Norm
from assay.vhack.directions.gradients.per_sample import check_finite
from assay.vhack.directions.gradients.replica import Replica
from tests.vhack.adapter import sequential_gradients, worst_error
from tests.wordings import refuses


@pytest.fixture
def module(small_model):
    """A copy of the small model that a test may change."""
    return copy.deepcopy(small_model.module)


@pytest.fixture
def encoded(byte_tokenizer, samples):
    return encode(byte_tokenizer, samples, [str(n) for n in range(len(samples))], 1000)


@pytest.mark.slow
def test_they_equal_the_loop_on_a_reference_model():
    model = load_model("reference:llama", dtype="float32", device="cpu")
    text = "def solve(x):\n    # start with x; add 7; take the remainder of division by 9\n"
    samples = [
        Sample(
            text,
            "    x = x + 7\n    return x % 9\n\n\ndef run_tests():\n    assert solve(2) == 0\n",
        ),
        Sample("import os", "\n"),
        # Long enough for the ways that are meant for long samples.
        Sample(text * 40, "    return (x + 7) % 9\n" * 20),
    ]
    svd = weight_svd(model, method="gram")
    found = per_sample_gradients(samples, model, svd=svd)
    assert (
        worst_error(found, sequential_gradients(model.module, model.tokenizer, samples, svd)) < 1e-5
    )


@pytest.mark.parametrize(
    "how",
    [{}, {"max_tokens": 1}, {"max_tokens": 100}, {"checkpointing": True}, {"svd": None}],
    ids=str,
)
def test_they_equal_the_loop_through_the_adapter_in_batches_of_any_size(
    gradients_of, module, small_svd, wanted, how
):
    found = gradients_of(module, **how)
    assert worst_error(found, wanted) < 1e-5
    assert {name: rows.shape for name, rows in found.items()} == {
        n: (5, each.rank) for n, each in small_svd.items()
    }
    assert all(rows.dtype == torch.float32 and rows.device.type == "cpu" for rows in found.values())
    assert not any("forward" in vars(layer) for layer in module.model.layers)


def test_truncated_factors_give_the_first_coordinates(gradients_of, cut_svd, wanted):
    found = gradients_of(svd=cut_svd)
    assert worst_error(found, {name: rows[:, :8] for name, rows in wanted.items()}) < 1e-4


def test_bfloat16_is_close_to_float32_by_the_norms_of_float32(
    monkeypatch, small_checkpoint, gradients_of, wanted
):
    model = load_model(small_checkpoint, dtype="bfloat16", device="cpu")
    norms = []
    real = Norm.apply
    monkeypatch.setattr(Norm, "apply", lambda *given: norms.append(given) or real(*given))
    found = gradients_of(model, svd=weight_svd(model, dtype="bfloat16"), max_tokens=4096)
    assert len(norms) > 2 * model.num_layers
    for name, rows in found.items():
        assert rows.dtype == torch.float32
        # Singular vectors of rounded weights differ a little, and so do the coordinates.
        assert torch.cosine_similarity(rows, wanted[name], dim=1).min() > 0.9, name


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(gradients_of, module, fails):
    module.train()
    module.model.layers[0].eval()
    module.model.embed_tokens.weight.requires_grad_(False)
    module.model.norm.weight.grad = torch.ones_like(module.model.norm.weight)
    before = _state(module)
    weights = copy.deepcopy(module.state_dict())
    if fails:
        with pytest.raises(ZeroDivisionError):
            gradients_of(module, progress=lambda *_: 1 // 0)
    else:
        gradients_of(module, checkpointing=True)
    assert before == _state(module)
    assert all(torch.equal(weight, weights[name]) for name, weight in module.state_dict().items())


def _state(module):
    return [
        *(
            (name, p.requires_grad, p.grad is None or p.grad.tolist())
            for name, p in module.named_parameters()
        ),
        *(
            (part.training, len(part._forward_hooks), len(part._forward_pre_hooks))
            for part in module.modules()
        ),
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_batches_hold_similar_lengths_within_the_budget(small_model, encoded, packed):
    batches = plan_batches(encoded, 160, small_model.module, packed=packed)
    lengths = [[len(one.ids) for one in batch] for batch in batches]
    assert sorted(one.index for batch in batches for one in batch) == list(range(len(encoded)))
    assert [length for batch in lengths for length in batch] == sorted(
        (len(one.ids) for one in encoded), reverse=True
    )
    assert all(
        len(batch) == 1 or (sum(batch) if packed else max(batch) * len(batch)) <= 160
        for batch in lengths
    )
    assert len(batches) == (2 if packed else 3)


@pytest.mark.parametrize("packed", [False, True])
def test_samples_whose_numbers_follow_the_longest_beside_them_are_apart(encoded, packed):
    limit = sorted(len(one.ids) for one in encoded)[2]
    rotation = {"rope_type": "longrope", "original_max_position_embeddings": limit}
    config = SimpleNamespace(rope_parameters=rotation, max_position_embeddings=10_000)
    module = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    batches = plan_batches(encoded, 10_000, module, packed=packed)
    sides = [{len(one.ids) > limit for one in batch} for batch in batches]
    assert sides == [{True}, {False}]


def test_the_token_budget_follows_the_free_memory(small_model, encoded):
    budgets = []
    for free in (1, 20_000_000, 40_000_000, 10**15):
        room = room_for_batches(free, "cpu")
        budgets.append(
            [
                token_budget(small_model.module, encoded, room, checkpointing=is_set)
                for is_set in (False, True)
            ]
        )
    assert budgets[0] == [1, 1]
    assert budgets[1][0] < budgets[1][1]
    assert budgets[2][0] == pytest.approx(2 * budgets[1][0], abs=1)
    assert budgets[3] == [2048, 2048]
    assert room_for_batches(10**15, "cpu") < 2e9 < room_for_batches(10**15, "cuda")


def test_the_first_sample_with_a_number_that_is_not_finite_is_named_with_its_matrix():
    rows = {name: torch.ones(3, 4) for name in ("a", "b")}
    encoded = [Encoded(index, f"sample {index}", [1, 2], 1) for index in range(3)]
    check_finite(SampleGradients(rows), encoded)
    for bad in (torch.nan, torch.inf, -torch.inf):
        rows["a"][2, 3] = rows["b"][1, 0] = bad
        with refuses(
            DataError, "the first sample with a number that is not finite is named with its matrix"
        ):
            check_finite(SampleGradients(rows), encoded)


@pytest.mark.parametrize(
    "full", [torch.OutOfMemoryError("no room"), RuntimeError("can't allocate memory")], ids=repr
)
def test_a_batch_that_runs_out_of_memory_is_split(monkeypatch, gradients_of, wanted, full):
    """A GPU has an error of its own for it, a CPU has not."""
    real = Replica.gradients
    sizes = []

    def cramped(replica, encoded):
        sizes.append(len(encoded))
        if len(encoded) > 2:
            raise full
        return real(replica, encoded)

    monkeypatch.setattr(Replica, "gradients", cramped)
    monkeypatch.setattr(
        torch, "get_num_threads", lambda: 1
    )  # with more, batches run side by side and are smaller
    assert worst_error(gradients_of(max_tokens=10_000), wanted) < 1e-5
    assert sizes == [5, 2, 3, 1, 2]


def test_one_sample_that_does_not_fit_is_named(monkeypatch, gradients_of):
    def full(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Replica, "gradients", full)
    with refuses(OutOfMemory, "one sample that does not fit is named"):
        gradients_of()


def test_the_longest_sample_that_fits_is_used_and_a_longer_one_is_named(gradients_of):
    found = gradients_of(chosen=[Sample("p" * 120, "c" * 8)])
    assert all(torch.isfinite(rows).all() and rows.any() for rows in found.values())
    with refuses(DataError, "the longest sample that fits is used and a longer one is named"):
        gradients_of(chosen=[Sample("a", "b"), Sample("p" * 120, "c" * 9)])


def test_a_loss_that_is_not_finite_is_named(gradients_of, module, byte_tokenizer):
    # Only the third sample has a quotation mark.
    (quote,) = byte_tokenizer("'")["input_ids"]
    module.model.embed_tokens.register_forward_hook(
        lambda _, ids, output: output.masked_fill((ids[0] == quote)[..., None], torch.inf)
    )
    with refuses(DataError, "a loss that is not finite is named"):
        gradients_of(module, max_tokens=1, names=["a", "b", "third", "d", "e"])


def test_a_gradient_that_is_not_finite_is_named(gradients_of, module):
    def spoil(_, __, output):
        output.register_hook(lambda gradient: gradient * torch.nan)

    module.model.layers[1].mlp.up_proj.register_forward_hook(spoil)
    with refuses(DataError, "a gradient that is not finite is named"):
        gradients_of(module)


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [
        ({"chosen": []}, "no samples"),
        ({"tokenizer": None}, "without a tokenizer"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"modules": ["lm_head"]}, "'lm_head', which carries no δS"),
        ({"modules": []}, "no module at all"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for_is_refused(gradients_of, wrong, seen):
    with pytest.raises(UsageError, match=seen):
        gradients_of(**wrong)


def test_some_modules_can_be_had_alone(gradients_of, small_model, wanted):
    names = ["model.layers.2.mlp.down_proj", "model.layers.0.self_attn.v_proj"]
    found = gradients_of(modules=names)
    assert list(found) == names[::-1]
    assert worst_error(found, {name: wanted[name] for name in found}) < 1e-5
    assert list(weight_svd(small_model, modules=names)) == names[::-1]


def test_weights_without_memory_are_refused_by_name(gradients_of, module):
    """As offloading leaves them."""
    module.model.layers[1].mlp.up_proj.to("meta")
    for work in (weight_svd, gradients_of):
        with pytest.raises(ModelError) as refused:
            work(module)
        assert "layers.1.mlp.up_proj" in refused.value.seen


def test_a_norm_without_memory_is_refused(module):
    module.model.norm.to("meta")
    for work in (weights_digest, DeltaS):
        with pytest.raises(ModelError):
            work(module)


def test_factors_of_another_model_are_refused(gradients_of):
    other = weight_svd(load_model("reference:qwen3", dtype="float32", device="cpu"), method="gram")
    with refuses(UsageError, "factors of another model are refused"):
        gradients_of(svd=other)


def test_float16_is_refused(gradients_of, module):
    with refuses(ModelError, "float16 is refused"):
        gradients_of(module.half())


def test_a_model_without_projections_is_refused():
    with refuses(ModelError, "a model without projections is refused"):
        target_modules(nn.Sequential(nn.Linear(4, 4)))
