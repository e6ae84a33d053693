"""A packed layer gives what transformers gives for each sample, and the same gradients."""

from types import SimpleNamespace

import pytest
import torch

from assay.vhack.directions.gradients.batches import Segments
from assay.vhack.directions.gradients.packed import packed_forward

LENGTHS = [1, 63, 64, 65, 130]


@pytest.fixture(
    params=[("qwen3", 4, 2), ("llama", 4, 1), ("granite", 3, 3)], ids=lambda each: each[0]
)
def model(request):
    from transformers import AutoConfig, AutoModel

    family, heads, groups = request.param
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "vocab_size": 16,
    }
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": groups}
    sizes |= (
        {"residual_multiplier": 0.4, "attention_multiplier": 0.3} if family == "granite" else {}
    )
    config = AutoConfig.for_model(family, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModel.from_config(config).eval().requires_grad_(False)


def _batch(spans=None):
    segments = Segments.of(LENGTHS, torch.device("cpu"))
    rows = [row for span in spans or segments.bounds for row in range(*span)]
    return SimpleNamespace(segments=segments, label_rows=torch.tensor(rows))


def _leaf():
    return torch.randn(
        1, sum(LENGTHS), 24, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()


def _outcome(model, forwards, weight):
    """What comes out of layers of a packed row, and the gradient of its input."""
    leaf = _leaf()
    rotation = model.rotary_emb(leaf, torch.cat([torch.arange(length) for length in LENGTHS])[None])
    out = leaf
    for forward in forwards:
        out = forward(out, position_embeddings=rotation)
    return out, torch.autograd.grad((out * weight).sum(), leaf)[0]


def _one_by_one(model, layers, weight):
    """What transformers gives for every sample by itself."""
    leaf = _leaf()
    outs = []
    for part in leaf.split(LENGTHS, dim=1):
        rotation = model.rotary_emb(part, torch.arange(part.shape[1])[None])
        for layer in layers:
            part = layer(part, position_embeddings=rotation)
        outs.append(part)
    out = torch.cat(outs, dim=1)
    return out, torch.autograd.grad((out * weight).sum(), leaf)[0]


def _weight():
    return torch.randn(1, sum(LENGTHS), 24, generator=torch.Generator().manual_seed(1))


def test_it_gives_what_transformers_gives(model):
    forwards = [packed_forward(layer, _batch, None, labels_only=False) for layer in model.layers]
    found = _outcome(model, forwards, _weight())
    wanted = _one_by_one(model, model.layers, _weight())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_queries_that_no_loss_asks_for_are_left_out(model):
    bounds = Segments.of(LENGTHS, torch.device("cpu")).bounds
    spans = [(start + (end - start) // 3, end - 1) for start, end in bounds]
    asked = torch.zeros(1, sum(LENGTHS), 1)
    for begin, end in spans:
        asked[:, begin:end] = 1
    layer = model.layers[0]
    late = packed_forward(layer, lambda: _batch(spans), None, labels_only=True)
    out, gradient = _outcome(model, [late], _weight() * asked)
    wanted, wanted_gradient = _one_by_one(model, [layer], _weight() * asked)
    assert not (out * (1 - asked)).any()
    torch.testing.assert_close(out, wanted * asked, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-5, atol=1e-5)
