"""The engine: what it returns, and that layer transforms are what the formulas say."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from assay import streams
from assay.errors import LayersNotFound, UsageError
from assay.models.decoder import backbone, decoder_layers
from assay.poc import HFEngine, Round
from assay.poc.protocol.transforms import project

NUMPY = streams.get_backend("numpy")


@pytest.fixture(scope="module")
def engine(small_model) -> HFEngine:
    return HFEngine(small_model, batch_size=4, seq_len=16)


def test_inputs_are_the_stream_in_row_major_order(engine: HFEngine, round_: Round):
    inputs = engine.inputs(round_, [0, 5])
    for row, nonce in enumerate((0, 5)):
        expected = NUMPY.normals(streams.seeds([f"block_alpha_node_A_nonce{nonce}"]), 16 * 64)[0].reshape(16, 64)
        np.testing.assert_array_equal(inputs[row].numpy(), expected)
    strong = engine.inputs(replace(round_, strength=256), [0])
    expected = NUMPY.normals(streams.seeds(["block_alpha_node_A_nonce0"], 256), 16 * 64)[0].reshape(16, 64)
    np.testing.assert_array_equal(strong[0].numpy(), expected)


def test_without_weights_the_last_token_is_read_after_the_final_norm(engine: HFEngine, round_: Round):
    inputs = engine.inputs(round_, range(4))
    with torch.inference_mode():
        plain = engine.model.module.model(inputs_embeds=inputs).last_hidden_state[:, -1].float()
    torch.testing.assert_close(engine.read(inputs), plain, atol=1e-6, rtol=0)


def test_attention_is_causal_and_positions_matter(engine: HFEngine, round_: Round):
    inputs = engine.inputs(round_, range(4))
    changed = inputs.clone()
    changed[:, 0] += 1
    swapped = inputs.clone()
    swapped[:, [3, 7]] = inputs[:, [7, 3]]
    base = engine.read(inputs)
    assert not torch.allclose(base, engine.read(changed), atol=1e-6)
    assert not torch.allclose(base, engine.read(swapped), atol=1e-6)


def test_another_shape_is_refused(engine: HFEngine, round_: Round):
    with pytest.raises(UsageError, match="fixed shape"):
        engine.read(engine.inputs(round_, range(3)))


def by_hand(engine: HFEngine, inputs: torch.Tensor, function) -> torch.Tensor:
    """Run the layers one after the other, applying a function after each."""
    body = backbone(engine.model.module)
    positions = torch.arange(inputs.shape[1])[None]
    rotary = body.rotary_emb(inputs, positions)
    x = inputs
    for index, layer in enumerate(decoder_layers(engine.model.module)):
        x = layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        x = function(x, index)
    return body.norm(x)[:, -1].float()


def signs(x: torch.Tensor, index: int) -> torch.Tensor:
    return x * torch.from_numpy(NUMPY.signs(streams.seeds([f"block_alpha_layer_{index}_signs"]), 64)[0])


def reflection(x: torch.Tensor, index: int) -> torch.Tensor:
    v = torch.from_numpy(NUMPY.normals(streams.seeds([f"block_alpha_layer_{index}_householder"]), 64)[0])
    v = v / v.norm()
    return x - 2 * (x @ v)[..., None] * v


def normalized(x: torch.Tensor, index: int) -> torch.Tensor:
    return reflection(x / (x.norm(dim=-1, keepdim=True) + 1e-8), index)


@pytest.mark.parametrize(
    ("step", "function"), [("signs", signs), ("reflect", reflection), ("normalize_reflect", normalized)]
)
def test_layer_transforms_are_their_formulas(step, function, engine: HFEngine, round_: Round):
    inputs = engine.inputs(round_, range(4))
    before = engine.read(inputs)
    with engine.between_layers(step, round_):
        hooked = engine.read(inputs)
    with torch.inference_mode():
        torch.testing.assert_close(hooked, by_hand(engine, inputs, function), atol=2e-4, rtol=1e-4)
    assert not torch.allclose(before, hooked, atol=1e-3)
    assert torch.equal(engine.read(inputs), before), "hooks must be gone"


def test_hooks_are_removed_after_an_error(engine: HFEngine, round_: Round):
    before = engine.read(engine.inputs(round_, range(4)))
    with pytest.raises(RuntimeError), engine.between_layers("signs", round_):
        raise RuntimeError
    assert torch.equal(engine.read(engine.inputs(round_, range(4))), before)


def test_an_unknown_architecture_fails_loudly(small_model, round_: Round):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = small_model.module.config
            self.body = backbone(small_model.module)

    with pytest.raises(LayersNotFound):
        decoder_layers(Odd())


def test_trained_head_is_the_model_s(engine: HFEngine):
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(engine.trained_head(x), engine.model.module.lm_head(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 9, 11, 32])
def test_a_projected_row_does_not_depend_on_its_place(rows: int):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 64, generator=generator)
    weight = torch.randn(300, 64, generator=generator)
    torch.testing.assert_close(project(x, weight), x @ weight.T, atol=1e-4, rtol=1e-5)
    order = torch.randperm(rows, generator=generator)
    assert torch.equal(project(x[order], weight), project(x, weight)[order])


def test_fingerprints_tell_engines_apart(small_model):
    first = HFEngine(small_model, batch_size=4, seq_len=16).fingerprint
    assert first == HFEngine(small_model, batch_size=4, seq_len=16).fingerprint
    others = [HFEngine(small_model, batch_size=8, seq_len=16), HFEngine(small_model, batch_size=4, seq_len=32)]
    assert len({first.id, *(engine.fingerprint.id for engine in others)}) == 3
    assert first.dtype == "float32"
    assert first.attention == "sdpa"
