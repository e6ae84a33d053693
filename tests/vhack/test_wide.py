"""v_hack on a CPU without fast products of 16-bit numbers: gradients, δS and sampling without a
narrow one.
"""

from pathlib import Path

import pytest
import torch

from assay.models import load_model, precision
from assay.models.precision import wide_products
from assay.vhack import per_sample_gradients, weight_svd
from assay.vhack.directions.delta import DeltaS
from assay.vhack.training.sampling import sample_pool
from tests.models.narrow import Products, narrow_model

pytestmark = pytest.mark.usefixtures("without_fast_products")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_taken_without_a_narrow_product(
    small_checkpoint: Path,
    byte_tokenizer,
    samples,
    checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    model = narrow_model(small_checkpoint)
    svd = weight_svd(model, dtype="bfloat16")
    how = {"tokenizer": byte_tokenizer, "svd": svd, "checkpointing": checkpointing}
    with Products() as products:
        found = per_sample_gradients(samples, model, **how)
    assert products.narrow == []
    assert products.wide
    monkeypatch.setattr(precision, "has_fast_products", lambda dtype: True)
    plain = per_sample_gradients(samples, model, **how)
    for name, rows_NR in plain.items():
        assert (found[name] - rows_NR).norm() < 0.02 * rows_NR.norm()


def test_delta_is_trained_without_a_narrow_product(small_checkpoint: Path):
    model = narrow_model(small_checkpoint)
    adapter = DeltaS(model, weight_svd(model, dtype="bfloat16"))
    with Products() as products, wide_products(model):
        logits = model.module(torch.arange(48).view(3, 16), use_cache=False).logits
        logits.float().logsumexp(-1).sum().backward()
    assert products.narrow == []
    assert products.wide
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in adapter.delta)


@pytest.mark.slow
def test_completions_are_sampled_without_a_narrow_product():
    teacher = load_model("reference:organism", device="cpu")
    assert teacher.dtype == torch.bfloat16
    with Products() as products:
        pool = sample_pool(teacher, ["def f(", "class A"], per_prompt=4, max_new_tokens=3, batch=8)
    assert len(list(pool)) == 8
    assert products.narrow == []
    assert products.wide
