"""The decoder between kernels of its own is transformers' decoder, in bfloat16 and in eight
bits.
"""

from types import ModuleType

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from assay.errors import ModelError
from assay.models import Model
from assay.models.decoder import backbone
from assay.models.eight_bits import FLOAT8, INT8, Arithmetic, Rounded, float8_blocks, round_linears
from assay.poc.engines.hf import lean_decoder
from assay.poc.engines.hf.lean_decoder import LeanDecoder, fusible, is_lean
from tests.models.storing import in_eight_bits, rounded_weight
from tests.poc.engines import plain_kernels
from tests.wordings import refuses

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0,
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
    "llama, biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralForCausalLM, MistralConfig, {"head_dim": 32, "sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32, "num_key_value_heads": 4}),
    "one layer": (Qwen3ForCausalLM, Qwen3Config, {"num_hidden_layers": 1}),
    "mixture": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 48, "norm_topk_prob": True}),
}  # fmt: skip
LENGTH = 24


BLOCKS = float8_blocks(128, 128)
EIGHT_BITS = [FLOAT8, BLOCKS, INT8]
FORMATS = [None, *EIGHT_BITS]
WIDTHS = [96, 160, 1024, 2560, 3072, 4096, 9728, 14336]


def made(kind: str, dtype: torch.dtype = torch.float32) -> Model:
    factory, config, more = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = factory(config(**{**SHAPE, **more})).to(dtype).eval()
        for parameter in module.parameters():
            # Biases start as zeros and norms as ones: a weight that is left out must show.
            parameter.data += 0.1 * torch.randn_like(parameter)
    return Model(module, None, kind, "", "trained")


def inputs(model: Model, batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, LENGTH, 64, generator=generator).to(model.dtype)


@torch.inference_mode()
def plain(model: Model) -> torch.Tensor:
    return backbone(model.module)(inputs_embeds=inputs(model), use_cache=False).last_hidden_state


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way through the decoder, with what the kernels compute in torch."""
    monkeypatch.setattr(lean_decoder, "kernels", lambda: plain_kernels)


def states(model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    decoder = LeanDecoder(model, LENGTH)
    with torch.inference_mode():
        given = inputs(model)
        before = given.clone()
        result = decoder.hidden(given), decoder.last_hidden(given)
    assert torch.equal(given, before)  # updates are added in place, and not there
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_its_states_are_those_of_transformers(kind: str, without_triton):
    model = made(kind)
    every, last = states(model)
    torch.testing.assert_close(every, plain(model), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(last, plain(model)[:, -1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("by", [FLOAT8, float8_blocks(32, 32), INT8], ids=lambda by: by.name)
@pytest.mark.parametrize("kind", KINDS)
def test_in_eight_bits_every_input_of_a_product_is_rounded_where_the_layers_round_it(
    kind, by, without_triton
):
    model = made(kind, torch.bfloat16)
    unrounded = plain(model)
    in_eight_bits(model.module.model, by)
    assert is_lean(model, LENGTH)
    every, last = states(model)
    assert torch.equal(every, plain(model))
    error, rounding = (
        (a - b).norm() / b.norm() for a, b in ((last, every[:, -1].float()), (every, unrounded))
    )
    assert (
        error < 0.03
    )  # the order of sums in the last layer, which moves some numbers to the next of the format
    assert 0.01 < rounding < 0.3


def test_rows_that_would_share_a_block_with_another_projection_are_left_to_the_layers():
    model = made("qwen2")
    in_eight_bits(model.module.model, float8_blocks(64, 64))  # keys have 32 rows
    assert not is_lean(model, LENGTH)


def test_experts_of_another_layout_are_refused_in_float8():
    model = made("mixture")
    model.module.model.layers[1].mlp.experts.has_bias = True
    with refuses(ModelError, "experts of another layout are refused in float8"):
        round_linears(backbone(model.module))


def test_it_is_chosen_where_its_kernels_run(small_model, monkeypatch: pytest.MonkeyPatch):
    assert not fusible(small_model, LENGTH)  # on a CPU
    monkeypatch.setattr(Model, "device", torch.device("cuda"))
    for found in (object(), None):
        monkeypatch.setattr(lean_decoder, "find_spec", lambda name, found=found: found)
        assert fusible(small_model, LENGTH) is (found is not None)
    monkeypatch.setattr(small_model.module.config, "hidden_act", "gelu")
    assert not is_lean(small_model, LENGTH)


def test_weights_that_share_memory_in_another_order_are_not_taken_for_fused_ones(without_triton):
    model = made("llama")
    before = plain(model)
    for layer in model.module.model.layers:
        attention = layer.self_attn
        linears = [attention.v_proj, attention.k_proj, attention.q_proj]
        whole = torch.cat([linear.weight.data for linear in linears])
        for linear, part in zip(
            linears, whole.split([len(linear.weight) for linear in linears]), strict=True
        ):
            linear.weight.data = part
    with torch.inference_mode():
        states = LeanDecoder(model, LENGTH).hidden(inputs(model))
        again = LeanDecoder(model, LENGTH).hidden(inputs(model))
    torch.testing.assert_close(states, before, atol=2e-5, rtol=1e-5)
    assert torch.equal(again, states)


def test_what_is_not_such_a_decoder_is_left_to_transformers():
    olmo = OlmoForCausalLM(OlmoConfig(**SHAPE)).eval()
    assert not is_lean(Model(olmo, None, "olmo", "", "trained"), LENGTH)
    model = made("qwen2")
    handle = model.module.model.layers[0].register_forward_hook(lambda *_: None)
    assert not is_lean(model, LENGTH)
    handle.remove()
    assert is_lean(model, LENGTH)
    model.module.model.layers[0].mlp.forward = lambda x: x
    assert not is_lean(model, LENGTH)
    eager = made("qwen3")
    eager.module.config._attn_implementation = "eager"
    assert not is_lean(eager, LENGTH)
    other = made("llama")
    other.module.model.layers[2].mlp.up_proj = type("Adapted", (torch.nn.Linear,), {})(64, 96)
    assert not is_lean(other, LENGTH)


def test_hooks_that_transformers_leaves_behind_do_not_count():
    model = made("qwen3")
    model.module(torch.tensor([[1, 2, 3]]), output_hidden_states=True)
    assert any(layer._forward_hooks for layer in model.module.model.layers)
    assert is_lean(model, LENGTH)


def test_a_window_matters_where_it_is_shorter_than_the_sequence():
    model = made("mistral")
    model.module.config.sliding_window = LENGTH - 1
    assert not is_lean(model, LENGTH)
    assert is_lean(model, LENGTH - 1)


gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_cuda(*shape: int, seed: int) -> torch.Tensor:
    values = 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to("cuda", torch.bfloat16)


def kernels() -> ModuleType:
    return lean_decoder.kernels()


def share_that_differs(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert torch.isfinite(ours.float()).all()
    return (ours.float() != theirs.float()).float().mean().item()


def shares_that_differ(ours, theirs) -> list[float]:
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
    return [share_that_differs(a, b) for a, b in pairs]


def same(ours: Rounded, theirs: Rounded) -> bool:
    values = torch.equal(ours.values.view(torch.uint8), theirs.values.view(torch.uint8))
    return values and torch.equal(ours.scales, theirs.scales)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [37, 1024])
class TestKernels:
    """Each kernel against its definition, which only the order of the sums in a norm may leave."""

    pytestmark = gpu

    @pytest.mark.parametrize("by", FORMATS, ids=lambda by: by.name if by else "bfloat16")
    def test_norm(self, width: int, rows: int, by: Arithmetic | None):
        h = on_cuda(rows, width, seed=1)
        update = on_cuda(rows, width, seed=2)
        weight = on_cuda(width, seed=3)
        for added in (None, update):
            ours, theirs = (
                use.normalised(h, added, weight, 1e-6, by) for use in (kernels(), plain_kernels)
            )
            assert torch.equal(ours[0], theirs[0])
            assert max(shares_that_differ(ours[1], theirs[1])) < 1e-3

    @pytest.mark.parametrize("by", FORMATS, ids=lambda by: by.name if by else "bfloat16")
    def test_gate(self, width: int, rows: int, by: Arithmetic | None):
        x = on_cuda(rows, 2 * width, seed=4)
        ours, theirs = (use.gated(x, by) for use in (kernels(), plain_kernels))
        assert max(shares_that_differ(ours, theirs)) < (1e-3 if by else 1e-4)

    @pytest.mark.parametrize("by", EIGHT_BITS, ids=lambda by: by.name)
    def test_rounding(self, width: int, rows: int, by: Arithmetic):
        x = on_cuda(rows, width, seed=5)
        x[3] = 0
        assert same(kernels().rounded(x, by), plain_kernels.rounded(x, by))
        x[5, 7], x[6, 1] = torch.nan, torch.inf
        values, scales = kernels().rounded(x, by)
        assert scales[5, 0].isnan()
        assert scales[6, 0].isinf()
        assert (values.float() * scales[:, :1])[:5].isfinite().all()


@pytest.mark.parametrize("width", [64, 2048])
class TestMixture:
    """Rows to experts and back."""

    pytestmark = gpu

    def test_spread_and_combined(self, width: int):
        x = on_cuda(300, width, seed=10)
        y = on_cuda(2400, width, seed=11)
        places = torch.randperm(2400, generator=torch.Generator().manual_seed(12)).cuda()
        shares = on_cuda(300, 8, seed=13)
        assert torch.equal(kernels().spread(x, places, None), plain_kernels.spread(x, places, None))
        for by in EIGHT_BITS:
            assert same(kernels().spread(x, places, by), plain_kernels.spread(x, places, by))
        sums = kernels().combined(y, places, shares), plain_kernels.combined(y, places, shares)
        assert share_that_differs(*sums) < 1e-2  # the order of a sum of eight


def on_cpu(rounded: Rounded) -> Rounded:
    return Rounded(*(part.cpu() for part in rounded))


@pytest.mark.parametrize("by", [BLOCKS, INT8], ids=lambda by: by.name)
@pytest.mark.parametrize(("width", "outputs"), [(160, 48), (768, 640), (2048, 1280)])
class TestProducts:
    """Products on CUDA against the definition on a CPU: the same bits in int8, and a rounding away
    in float8.
    """

    pytestmark = gpu

    def check(self, ours: torch.Tensor, theirs: torch.Tensor, by: Arithmetic) -> None:
        if by is INT8:
            assert torch.equal(ours.cpu(), theirs)
            return
        assert (ours.cpu() - theirs).float().norm() < 1e-3 * theirs.float().norm()
        assert torch.isfinite(ours).all()

    @pytest.mark.parametrize("rows", [3, 67, 1024])
    def test_product(self, rows: int, width: int, outputs: int, by: Arithmetic):
        x = kernels().rounded(on_cuda(rows, width, seed=14), by)
        weight = rounded_weight(on_cuda(outputs, width, seed=15), by)
        bias = on_cuda(outputs, seed=16)
        ours = by.product(x, weight, bias, torch.bfloat16)
        self.check(ours, by.product(on_cpu(x), on_cpu(weight), bias.cpu(), torch.bfloat16), by)
        turned = Rounded(
            x.values.view(torch.uint8).roll(1, 0).view(x.values.dtype), x.scales.roll(1, 0)
        )
        assert torch.equal(by.product(turned, weight, bias, torch.bfloat16), ours.roll(1, 0))

    def test_grouped_product(self, width: int, outputs: int, by: Arithmetic):
        weights = rounded_weight(on_cuda(5, outputs, width, seed=17), by)
        ends = torch.tensor([0, 140, 141, 141, 500], dtype=torch.int32)
        x = kernels().rounded(on_cuda(500, width, seed=18), by)
        ours = by.grouped_product(x, weights, ends.cuda(), torch.bfloat16)
        self.check(ours, by.grouped_product(on_cpu(x), on_cpu(weights), ends, torch.bfloat16), by)
        # A row beside others, and as the only one of its weight.
        alone = Rounded(*(part[150:152].contiguous() for part in x))
        ends = torch.tensor([0, 0, 0, 0, 2], dtype=torch.int32).cuda()
        assert torch.equal(by.grouped_product(alone, weights, ends, torch.bfloat16), ours[150:152])


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(16, 8, 128), (32, 8, 64), (3, 1, 24)])
class TestHeads:
    """Queries and keys, normed and turned."""

    pytestmark = gpu

    def test_turn(self, heads: int, key_heads: int, width: int, normed: bool):
        angles = 3 * torch.randn(12, 1, width // 2, generator=torch.Generator().manual_seed(6))
        rotation = tuple(
            f(torch.cat([angles, angles], -1)).to("cuda", torch.bfloat16)
            for f in (torch.cos, torch.sin)
        )
        norms = (on_cuda(width, seed=7), on_cuda(width, seed=8)) if normed else (None, None)
        x = on_cuda(5, 12, (heads + 2 * key_heads) * width, seed=9)
        last = x[:, -1, : heads * width].contiguous()
        for given, more in (
            (x, {"queries": heads, "heads": heads + key_heads}),
            (last, {"queries": heads, "heads": heads, "first_position": 11}),
        ):
            ours = given.clone()
            theirs = given.clone()
            for use, y in ((kernels(), ours), (plain_kernels, theirs)):
                use.turned(y, norms, rotation, 1e-6, width=width, **more)
            assert share_that_differs(ours, theirs) < (1e-3 if normed else 1e-9)
            assert not torch.equal(ours, given)
