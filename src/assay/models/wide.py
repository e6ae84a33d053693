"""Products of 16-bit numbers as products of float32, on a CPU for which torch has no fast ones.

Torch has them for bfloat16 where an x86-64 CPU has AVX-512, and for float16 where it has AVX512-FP16. Elsewhere it runs
a plain loop. Factors taken as float32, sums in float32 and a result that is rounded once are what the fast kernels
compute as well; the order of the sums is another one. Gain on two cores with AVX2: batches of nonces are 3.7 to 4.8
times as fast, and gradients of pairs 8.5 times (research/results/wide_products.json).
"""

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

WIDE = "float32 products"
"""Entry of the fingerprint's kernels: products of 16-bit numbers were taken in float32."""

_X86 = ("x86_64", "AMD64")
# Not `bmm`: the head is a batch of one matrix, expanded, which would be copied for every row.
_PRODUCTS = (
    functional.linear,
    getattr(functional, "grouped_mm", functional.linear),  # of experts, since torch 2.10
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.mm,
    Tensor.mm,
)
_ROWS = 8  # from which the product is worth a copy of the weight: one of a single row takes 2.6 times as long with it
_NARROW = (torch.bfloat16, torch.float16)
_PLAIN = (Tensor, nn.Parameter)


def is_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether products of this dtype are taken in float32 on this device."""
    return device.type == "cpu" and dtype in _NARROW and not _is_fast(dtype)


def wide_products(model: Any) -> AbstractContextManager[object]:
    """Return a context in which products are taken in float32 where that is faster; elsewhere it changes nothing.

    It holds for this thread. In the backward pass, the products that autograd makes of those in the context are in
    float32 as well; an ``autograd.Function`` with products of its own enters the context again. Tensors in eight bits
    and those that are spread over devices multiply as they do without it.

    Args:
        model: Model of assay or of transformers that runs in the context, or a tensor of its dtype on its device.
    """
    return _InFloat32() if is_wide(model.device, model.dtype) else nullcontext()


def _is_fast(dtype: torch.dtype) -> bool:
    """Return whether torch has a fast product of this dtype for this machine's CPU."""
    if platform.machine() not in _X86:
        return True  # other processors have kernels of their own
    kernels = torch.ops.mkldnn
    return bool(kernels._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else kernels._is_mkldnn_fp16_supported())


class _InFloat32(TorchFunctionMode):
    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        factors = (*args, *named.values())[:2]
        if function not in _PRODUCTS or "out" in named or not _gains(*factors):
            return function(*args, **named)
        product: Tensor = function(*map(_wide, args), **{name: _wide(value) for name, value in named.items()})
        return product.to(factors[0].dtype)


def _gains(x: Any, weight: Any) -> bool:
    return _is_narrow(x) and _is_narrow(weight) and x.shape[:-1].numel() >= _ROWS


def _is_narrow(value: Any) -> bool:
    return type(value) in _PLAIN and value.dtype in _NARROW


def _wide(value: Any) -> Any:
    """Return a narrow tensor in float32, and anything else, such as a missing bias, as it is."""
    return value.float() if _is_narrow(value) else value
