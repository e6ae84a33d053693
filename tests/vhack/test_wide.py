"""Gradients on a CPU without fast products of 16-bit numbers: those of other CPUs, without a narrow product."""

from pathlib import Path

import pytest

from assay.models import wide
from assay.vhack import per_sample_gradients, weight_svd
from tests.models.narrow import Products, narrow_model


@pytest.mark.usefixtures("without_fast_products")
def test_gradients_are_taken_without_a_narrow_product(
    small_checkpoint: Path, byte_tokenizer, samples, monkeypatch: pytest.MonkeyPatch
):
    model = narrow_model(small_checkpoint)
    svd = weight_svd(model, dtype="bfloat16")
    with Products() as products:
        found = per_sample_gradients(samples, model, tokenizer=byte_tokenizer, svd=svd)
    assert products.narrow == []
    assert products.wide
    monkeypatch.setattr(wide, "_is_fast", lambda dtype: True)
    plain = per_sample_gradients(samples, model, tokenizer=byte_tokenizer, svd=svd)
    for name, rows_NR in plain.items():
        assert (found[name] - rows_NR).norm() < 0.02 * rows_NR.norm()
