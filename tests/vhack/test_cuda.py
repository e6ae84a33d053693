"""On a GPU as on a CPU: factors, gradients and digests; its kernels are in test_ways.py."""

from dataclasses import replace

import pytest
import torch

from assay.models import load_model
from assay.vhack import extract, per_sample_gradients, weight_svd, weights_digest
from assay.vhack.directions.gradients import per_sample as _gradients
from assay.vhack.directions.gradients.replica import recipe_for
from tests.vhack.adapter import sequential_gradients, worst_error
from tests.vhack.test_svd import errors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module", params=["reference:qwen3", "reference:llama"])
def models(request):
    """One model on the CPU and on the GPU, in float32."""
    return tuple(
        load_model(request.param, dtype="float32", device=device) for device in ("cpu", "cuda")
    )


@pytest.fixture(scope="module")
def on_gpu_and_wanted(models, samples):
    on_cpu, on_gpu = models
    wanted = sequential_gradients(on_cpu.module, on_cpu.tokenizer, samples, weight_svd(on_cpu))
    return on_gpu, weight_svd(on_gpu), wanted


@pytest.mark.parametrize(
    "changes",
    [{}, {"packed": False}, {"factored": False}, {"packed": False, "factored": False}],
    ids=str,
)
@pytest.mark.parametrize("max_tokens", [100, None])
def test_gradients_on_the_gpu_equal_the_loop_on_the_cpu(
    monkeypatch, on_gpu_and_wanted, samples, changes, max_tokens
):
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


def test_factors_on_the_gpu_are_accurate(models):
    _, on_gpu = models
    for name, factors in weight_svd(on_gpu).items():
        assert max(errors(on_gpu.module.get_submodule(name).weight.double().cpu(), factors)) < 1e-5


def test_the_digest_does_not_depend_on_the_device(models):
    on_cpu, on_gpu = models
    assert weights_digest(on_cpu) == weights_digest(on_gpu)


def test_an_extraction_in_bfloat16(small_pairs):
    model = load_model("reference:qwen3", device="cuda")
    basis = extract(small_pairs, model)
    assert (basis.origin.dtype, basis.origin.factors) == ("bfloat16", "bfloat16")
    assert all(torch.isfinite(axes).all() and axes.any() for axes in basis.axes.values())
