"""On a GPU as on a CPU: factors, gradients, kernels and digests."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from assay.models import load_model
from assay.vhack import extract, per_sample_gradients, weight_svd, weights_digest
from assay.vhack.gradients import per_sample as _gradients
from assay.vhack.gradients import targets as _targets
from assay.vhack.gradients.batches import Segments
from assay.vhack.gradients.fused import Gate, Norm, load_kernels, sample_products, segment_products
from assay.vhack.gradients.per_sample import recipe_for
from tests.vhack.adapter import sequential_gradients, worst_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module", params=["reference:qwen3", "reference:llama"])
def models(request):
    """One model on the CPU and on the GPU, in float32."""
    return tuple(load_model(request.param, dtype="float32", device=device) for device in ("cpu", "cuda"))


@pytest.fixture(scope="module")
def on_gpu_and_wanted(models, samples):
    on_cpu, on_gpu = models
    wanted = sequential_gradients(on_cpu.module, on_cpu.tokenizer, samples, weight_svd(on_cpu))
    return on_gpu, weight_svd(on_gpu), wanted


@pytest.mark.parametrize(
    "changes", [{}, {"packed": False}, {"factored": False}, {"packed": False, "factored": False}], ids=str
)
@pytest.mark.parametrize("max_tokens", [100, None])
def test_gradients_on_the_gpu_equal_the_loop_on_the_cpu(monkeypatch, on_gpu_and_wanted, samples, changes, max_tokens):
    model, svd, wanted = on_gpu_and_wanted
    recipe = replace(recipe_for(model.module), **changes)
    monkeypatch.setattr(_gradients, "recipe_for", lambda *_: recipe)
    found = per_sample_gradients(samples, model, svd=svd, max_tokens=max_tokens)
    # Another order of summation, and singular vectors that came about another way.
    assert worst_error(found, wanted) < 1e-4


def test_gradients_do_not_change_from_run_to_run(on_gpu_and_wanted, samples):
    model, svd, _ = on_gpu_and_wanted
    first, second = (per_sample_gradients(samples, model, svd=svd) for _ in range(2))
    assert worst_error(first, second) < 1e-6


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def use(request):
    pytest.importorskip("triton")
    found = load_kernels(torch.device("cuda", torch.cuda.current_device()), request.param)
    assert found is not None
    return found, request.param


@pytest.mark.parametrize("columns", [64, 100, 2560])
def test_the_kernel_of_the_sum_over_rows(use, columns):
    found, dtype = use
    left, right = (torch.randn(700, columns, device="cuda").to(dtype) for _ in range(2))
    segments = Segments.of([1, 300, 33, 366], left.device)
    by_kernel, by_torch = (segment_products(left, right, segments.offsets, way) for way in (found, None))
    torch.testing.assert_close(by_kernel, by_torch, rtol=1e-5, atol=1e-4)
    assert torch.equal(by_kernel, segment_products(left, right, segments.offsets, found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("samples", [2, 9])
def test_products_of_samples_of_one_length(dtype, samples):
    generator = torch.Generator("cuda").manual_seed(1)
    left, right = (torch.randn(samples, 37, 70, device="cuda", dtype=dtype, generator=generator) for _ in range(2))
    wanted = torch.einsum("btr,btr->br", left.double(), right.double())
    found = sample_products(left, right)
    assert found.dtype == torch.float32
    assert (found - wanted).norm() < 1e-6 * wanted.norm()


@pytest.mark.parametrize("shape", [(37, 2560), (2, 5, 3, 128), (7, 48)])
def test_the_kernels_of_the_norm(use, shape):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    found, dtype = use
    norm = Qwen3RMSNorm(shape[-1], eps=1e-6).to("cuda", dtype)
    norm.weight.data.normal_()
    norm.weight.requires_grad_(False)
    inputs, gradient = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    results = []
    for ours in (True, False):
        leaf = inputs.clone().requires_grad_()
        out = Norm.apply(leaf, norm.weight, 1e-6, found) if ours else norm(leaf)
        results.append((out.detach(), torch.autograd.grad(out, leaf, gradient)[0]))
    _assert_close(*results, dtype)


def test_the_kernels_of_the_gate(use):
    found, dtype = use
    inputs = [(torch.randn(33, 700, device="cuda") * 4).to(dtype) for _ in range(2)]
    gradient = torch.randn(33, 700, device="cuda").to(dtype)
    results = []
    for ours in (True, False):
        a, b = (part.clone().requires_grad_() for part in inputs)
        out = Gate.apply(a, b, found) if ours else functional.silu(a) * b
        results.append((out.detach(), *torch.autograd.grad(out, (a, b), gradient)))
    _assert_close(*results, dtype)


def _assert_close(found, wanted, dtype):
    for ours, theirs in zip(found, wanted, strict=True):
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < (1e-6 if dtype == torch.float32 else 1e-2)


def test_factors_on_the_gpu_are_accurate(models):
    _, on_gpu = models
    for name, factors in weight_svd(on_gpu).items():
        weight = on_gpu.module.get_submodule(name).weight.double()
        left, right = factors.left.double(), factors.right.double()
        one = torch.eye(factors.rank, dtype=torch.float64, device="cuda")
        assert ((left * factors.values) @ right - weight).norm() < 1e-5 * weight.norm()
        assert max((left.T @ left - one).norm(), (right @ right.T - one).norm()) < 1e-5


def test_the_digest_does_not_depend_on_the_device(models, monkeypatch):
    on_cpu, on_gpu = models
    assert weights_digest(on_cpu) == weights_digest(on_gpu)
    monkeypatch.setattr(_targets, "_CHUNK", 1000)
    assert weights_digest(on_cpu) == weights_digest(on_gpu)


def test_an_extraction_in_bfloat16(small_pairs):
    model = load_model("reference:qwen3", device="cuda")
    basis = extract(small_pairs, model)
    assert (basis.origin.dtype, basis.origin.factors) == ("bfloat16", "bfloat16")
    assert all(torch.isfinite(axes).all() and axes.any() for axes in basis.axes.values())
