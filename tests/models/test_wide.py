"""Products of 16-bit numbers in float32: what they are, and where they are taken."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from assay.models import precision
from assay.models.precision import is_wide, own_precision, wide_products
from tests.models.narrow import Products

ENDS = torch.tensor([20, 48], dtype=torch.int32)
CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w, b: functional.linear(x, w, b),
    "linear, bias by name": lambda x, w, b: functional.linear(x, weight=w, bias=b),
    "linear, all by name": lambda x, w, b: functional.linear(input=x, weight=w, bias=b),
    "linear without bias": lambda x, w, b: functional.linear(x, w, None),
    "@": lambda x, w, b: x @ w.T,
    "matmul": lambda x, w, b: torch.matmul(x, w.T),
    "method": lambda x, w, b: x.matmul(w.T),
    "mm": lambda x, w, b: torch.mm(x, w.T),
    "experts": lambda x, w, b: functional.grouped_mm(x, w.view(2, 32, 96).mT, offs=ENDS),
}


def factors(dtype):
    torch.manual_seed(3)
    return torch.randn(48, 96).to(dtype), torch.randn(64, 96).to(dtype), torch.randn(64).to(dtype)


@BOTH
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.usefixtures("without_fast_products")
def test_a_product_is_that_of_float32_rounded_once(product, dtype):
    given = factors(dtype)
    with wide_products(given[0]):
        found = PRODUCTS[product](*given)
    assert found.dtype == dtype
    assert torch.equal(found, PRODUCTS[product](*(part.float() for part in given)).to(dtype))


@BOTH
@pytest.mark.usefixtures("without_fast_products")
def test_the_products_of_its_backward_pass_are_in_float32_too(dtype):
    x, weight, bias = (part.requires_grad_() for part in factors(dtype))
    passed_back = torch.ones(48, 64, dtype=dtype)
    with Products() as products, wide_products(x):
        functional.linear(x, weight, bias).backward(passed_back)
    assert products.narrow == []
    assert torch.equal(x.grad, (passed_back.float() @ weight.detach().float()).to(dtype))
    assert torch.equal(weight.grad, (passed_back.float().T @ x.detach().float()).to(dtype))


@pytest.mark.usefixtures("without_fast_products")
def test_other_numbers_multiply_as_before():
    class Stored(Tensor):
        """Weights of a library, which knows how to multiply them."""

    x, weight, _ = factors(torch.bfloat16)
    plain = x @ weight.T
    into = torch.empty(48, 64, dtype=torch.bfloat16)
    with Products() as products, wide_products(x):
        functional.linear(x, weight.as_subclass(Stored))
        assert len(products.narrow) == 1
        assert (x.float() @ weight.float().T).dtype == torch.float32
        assert (
            torch.mm(torch.ones(2, 3, dtype=torch.int64), torch.ones(3, 2, dtype=torch.int64)).sum()
            == 12
        )
        torch.mm(x, weight.T, out=into)
        assert torch.equal(into, plain)
        with pytest.raises(RuntimeError, match="same dtype"):
            functional.linear(x, weight.float())


def test_only_a_cpu_without_fast_products_takes_them(monkeypatch):
    monkeypatch.setattr(precision.platform, "machine", lambda: "aarch64")
    assert not is_wide(CPU, torch.bfloat16)
    monkeypatch.setattr(precision, "has_fast_products", lambda dtype: dtype == torch.bfloat16)
    assert not is_wide(CPU, torch.bfloat16)
    assert is_wide(CPU, torch.float16)
    assert not is_wide(CPU, torch.float32)
    assert not is_wide(torch.device("cuda"), torch.float16)


def test_full_products_last_until_every_pass_has_ended():
    """Passes of several threads overlap, and the modes are of the process."""
    x = torch.ones(1)
    torch.set_float32_matmul_precision("medium")
    try:
        first = own_precision(x)
        second = own_precision(x)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "highest"
        second.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
