"""Attention written out in blocks gives what transformers gives, and the same gradients."""

import copy

import pytest
import torch

from assay.vhack.gradients import _blocks
from assay.vhack.gradients._attention import PACKED, register
from assay.vhack.gradients._blocks import Attention
from assay.vhack.gradients._segments import Segments

LENGTHS = [1, 63, 64, 65, 130]


@pytest.fixture(params=[("qwen3", 4, 2), ("llama", 4, 1), ("granite", 3, 3)], ids=lambda each: each[0])
def model(request):
    from transformers import AutoConfig, AutoModel

    family, heads, groups = request.param
    register()
    config = AutoConfig.for_model(
        family,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=8,
        vocab_size=16,
        attn_implementation=PACKED,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModel.from_config(config).eval().requires_grad_(False)


def _outcome(model, forward, weight, seed=0):
    """What comes out, and the gradient of its input."""
    hidden = torch.randn(1, sum(LENGTHS), 24, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    segments = Segments.of(LENGTHS, hidden.device)
    out, _ = forward(
        hidden,
        position_embeddings=model.rotary_emb(hidden, positions),
        attention_mask=None,
        segments=segments,
        together=False,
    )
    return out, torch.autograd.grad((out * weight).sum(), hidden)[0]


@pytest.mark.parametrize("kept", [16384, 1])
def test_it_gives_what_transformers_gives(monkeypatch, model, kept):
    monkeypatch.setattr(_blocks, "_KEPT_WEIGHTS", kept)
    part = model.layers[0].self_attn
    weight = torch.randn(1, sum(LENGTHS), 24, generator=torch.Generator().manual_seed(1))
    written_out = Attention().forward(part, lambda: None)
    for found, wanted in zip(_outcome(model, written_out, weight), _outcome(model, part.forward, weight), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_queries_that_nobody_asks_for_are_left_out(monkeypatch, model):
    part = model.layers[0].self_attn
    bounds = Segments.of(LENGTHS, torch.device("cpu")).bounds
    spans = [(start + (end - start) // 3, end - 1) for start, end in bounds]
    asked = torch.zeros(1, sum(LENGTHS), 1)
    for begin, end in spans:
        asked[:, begin:end] = 1
    weight = torch.randn(1, sum(LENGTHS), 24, generator=torch.Generator().manual_seed(1)) * asked
    rows = []
    real = _blocks._blocks
    monkeypatch.setattr(_blocks, "_blocks", lambda *args: rows.append(list(real(*args))) or rows[-1])
    out, gradient = _outcome(model, Attention().forward(part, lambda: spans), weight)
    wanted, wanted_gradient = _outcome(model, part.forward, weight)
    torch.testing.assert_close(out * asked, wanted * asked, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-5, atol=1e-6)
    assert sum(last - first for _, first, last in rows[0]) == int(asked.sum()) < sum(LENGTHS)


def test_positions_are_turned_once_for_all_layers_of_a_pass(monkeypatch, model):
    part, attention = model.layers[0].self_attn, Attention()
    layers = [attention.forward(each, lambda: None) for each in (part, copy.deepcopy(part))]
    made = []
    real = _blocks.Turn.of
    monkeypatch.setattr(_blocks.Turn, "of", lambda *args: made.append(args) or real(*args))

    def both(hidden, **extra):
        return layers[1](layers[0](hidden, **extra)[0], **extra)

    weight = torch.ones(1, sum(LENGTHS), 24)
    first, other = (_outcome(model, both, weight, seed)[0] for seed in (0, 1))
    assert len(made) == 4  # queries and keys of two passes
    assert not torch.equal(first, other)


def test_attention_of_another_kind_is_left_alone(model):
    class OtherAttention(type(model.layers[0].self_attn)):
        pass

    part = copy.deepcopy(model.layers[0].self_attn)
    own = vars(part)["forward"] = lambda *_: None
    assert Attention().forward(part, lambda: None) is own
    del vars(part)["forward"]
    part.__class__ = OtherAttention
    assert Attention().forward(part, lambda: None) == part.forward
