"""The decoder between kernels of its own is transformers' decoder, in bfloat16 and in float8."""

from functools import partial
from types import ModuleType

import pytest
import torch

from assay.errors import ModelError
from assay.models import Model
from assay.models._quantise import quantise
from assay.poc.engines.hf import _compiled, _fused
from assay.poc.engines.hf._fused import fused_steps, fusible
from assay.poc.engines.hf._lean import LeanDecoder, lean_decoder
from tests.poc.engines import plain_kernels
from tests.poc.engines.test_lean import KINDS, LENGTH, inputs, made, plain

WIDTHS = [96, 160, 1024, 2560, 3072, 4096, 9728, 14336]


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way through the decoder, with what the kernels compute in torch."""
    monkeypatch.setattr(_fused, "kernels", lambda: plain_kernels)


def states(model: Model, *, float8: bool) -> tuple[torch.Tensor, torch.Tensor]:
    decoder = LeanDecoder(model, LENGTH, partial(fused_steps, float8=float8))
    with torch.inference_mode():
        given = inputs(model)
        before = given.clone()
        result = decoder.hidden(given), decoder.last_hidden(given)
    assert torch.equal(given, before)  # updates are added in place, and not there
    return result


@pytest.mark.parametrize("kind", [*KINDS, "mixture"])
def test_its_states_are_those_of_transformers(kind: str, without_triton):
    model = made(kind)
    every, last = states(model, float8=False)
    torch.testing.assert_close(every, plain(model), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(last, plain(model)[:, -1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "mixture"])
def test_in_float8_every_input_of_a_product_is_rounded_where_the_layers_round_it(kind: str, without_triton):
    model = made(kind, torch.bfloat16)
    unrounded = plain(model)
    quantise(model.module, "float8")
    every, last = states(model, float8=True)
    assert torch.equal(every, plain(model))
    error, rounding = ((a - b).norm() / b.norm() for a, b in ((last, every[:, -1].float()), (every, unrounded)))
    assert error < 0.03  # the order of sums in the last layer, which moves some numbers to the next of the format
    assert 0.01 < rounding < 0.3


def test_a_mixture_without_kernels_is_compiled_as_transformers_has_it(without_triton, monkeypatch):
    model = made("mixture")
    assert lean_decoder(model, LENGTH)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setenv(_compiled.CACHE, "unused")
    forward = _compiled.CompiledForward(model, 3, LENGTH)
    assert (forward.lean, forward.fused) == (False, False)
    with torch.inference_mode():
        assert torch.equal(forward.hidden(inputs(model)), plain(model))


def test_experts_of_another_layout_are_refused_in_float8():
    model = made("mixture")
    model.module.model.layers[1].mlp.experts.has_bias = True
    with pytest.raises(ModelError, match="experts is a Qwen3MoeExperts, and eight bits"):
        quantise(model.module, "float8")


def test_it_is_chosen_where_its_kernels_run(small_model, monkeypatch: pytest.MonkeyPatch):
    assert not fusible(small_model)  # on a CPU
    monkeypatch.setattr(Model, "device", torch.device("cuda"))
    monkeypatch.setattr(_fused, "find_spec", lambda name: object())
    assert fusible(small_model)
    monkeypatch.setattr(small_model.module.config, "hidden_act", "gelu")
    assert not fusible(small_model)
    monkeypatch.undo()
    monkeypatch.setattr(Model, "device", torch.device("cuda"))
    monkeypatch.setattr(_fused, "find_spec", lambda name: None)
    assert not fusible(small_model)


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_cuda(*shape: int, seed: int) -> torch.Tensor:
    values = 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to("cuda", torch.bfloat16)


def kernels() -> ModuleType:
    return _fused.kernels()


def share_that_differs(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert torch.isfinite(ours.float()).all()
    return (ours.float() != theirs.float()).float().mean().item()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [37, 1024])
class TestKernels:
    """Each kernel against its definition, which only the order of the sums in a norm may leave."""

    pytestmark = gpu

    def test_norm(self, width: int, rows: int):
        h, update, weight = on_cuda(rows, width, seed=1), on_cuda(rows, width, seed=2), on_cuda(width, seed=3)
        for added in (None, update):
            for float8 in (False, True):
                ours, theirs = (
                    use.normalised(h, added, weight, 1e-6, float8=float8) for use in (kernels(), plain_kernels)
                )
                assert torch.equal(ours[0], theirs[0])
                pairs = zip(ours[1], theirs[1], strict=True) if float8 else [(ours[1], theirs[1])]
                assert all(share_that_differs(a, b) < 1e-3 for a, b in pairs)

    def test_gate(self, width: int, rows: int):
        x = on_cuda(rows, 2 * width, seed=4)
        assert share_that_differs(kernels().gated(x, float8=False), plain_kernels.gated(x, float8=False)) < 1e-4
        ours, theirs = (use.gated(x, float8=True) for use in (kernels(), plain_kernels))
        assert all(share_that_differs(a, b) < 1e-3 for a, b in zip(ours, theirs, strict=True))

    def test_rounding(self, width: int, rows: int):
        x = on_cuda(rows, width, seed=5)
        x[3] = 0
        ours, theirs = (use.rounded(x) for use in (kernels(), plain_kernels))
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(ours, theirs, strict=True))
        x[5, 7], x[6, 1] = torch.nan, torch.inf
        values = kernels().rounded(x).values.float()
        assert values[5].isnan().any()
        assert values[6].isnan().any()
        assert values[:5].isfinite().all()


@pytest.mark.parametrize("width", [64, 2048])
class TestMixture:
    """Rows to experts and back."""

    pytestmark = gpu

    def test_spread_and_combined(self, width: int):
        x, y = on_cuda(300, width, seed=10), on_cuda(2400, width, seed=11)
        places = torch.randperm(2400, generator=torch.Generator().manual_seed(12)).cuda()
        shares = on_cuda(300, 8, seed=13)
        assert torch.equal(kernels().spread(x, places, float8=False), plain_kernels.spread(x, places, float8=False))
        ours, theirs = (use.spread(x, places, float8=True) for use in (kernels(), plain_kernels))
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(ours, theirs, strict=True))
        sums = kernels().combined(y, places, shares), plain_kernels.combined(y, places, shares)
        assert share_that_differs(*sums) < 1e-2  # the order of a sum of eight


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(16, 8, 128), (32, 8, 64), (3, 1, 24)])
class TestHeads:
    """Queries and keys, normed and turned."""

    pytestmark = gpu

    def test_turn(self, heads: int, key_heads: int, width: int, normed: bool):
        angles = 3 * torch.randn(12, 1, width // 2, generator=torch.Generator().manual_seed(6))
        rotation = tuple(f(torch.cat([angles, angles], -1)).to("cuda", torch.bfloat16) for f in (torch.cos, torch.sin))
        norms = (on_cuda(width, seed=7), on_cuda(width, seed=8)) if normed else (None, None)
        x = on_cuda(5, 12, (heads + 2 * key_heads) * width, seed=9)
        last = x[:, -1, : heads * width].contiguous()
        for given, more in (
            (x, {"queries": heads, "heads": heads + key_heads}),
            (last, {"queries": heads, "heads": heads, "first_position": 11}),
        ):
            ours, theirs = given.clone(), given.clone()
            for use, y in ((kernels(), ours), (plain_kernels, theirs)):
                use.turned(y, norms, rotation, 1e-6, width=width, **more)
            assert share_that_differs(ours, theirs) < (1e-3 if normed else 1e-9)
            assert not torch.equal(ours, given)
