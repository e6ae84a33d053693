"""The precision of products in a forward pass, whatever the program around it has set.

A process may let torch take products of float32 in bfloat16 or TF32, or have autocast on. Every
pass of assay is inside of :func:`own_precision`, which forces full products and puts back what was
set.

Products of 16-bit numbers are products of float32 on a CPU for which torch has no fast ones. Torch
has them for bfloat16 where an x86-64 CPU has AVX-512, and for float16 where it has AVX512-FP16.
Elsewhere it runs a plain loop. Factors taken as float32, sums in float32 and a result that is
rounded once are what the fast kernels compute as well; the order of the sums is another one. Gain
on two cores with AVX2: batches of nonces are 3.7 to 4.8 times as fast, and gradients of pairs 8.5
times (research/results/wide_products.json).
"""

import platform
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
LEAST_ROWS = 8
"""Rows from which a product is worth a copy of the weight: with it, one row takes 2.6 times as
long."""

_NARROW = (torch.bfloat16, torch.float16)
_PLAIN = (Tensor, nn.Parameter)

_SWITCHES: list[Any] = [
    backend.matmul
    for backend in (torch.backends.mkldnn, torch.backends.cuda)
    if hasattr(getattr(backend, "matmul", None), "fp32_precision")
]
"""Modes per kind of device, since torch 2.9; the mode of all products sets these too."""


class _FullProducts:
    """A context in which float32 products are in full float32, on every device and thread.

    The modes are those of the process: threads share the context, and the last one to leave it puts
    them back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                try:
                    self._before = torch.get_float32_matmul_precision()
                except RuntimeError:  # the switches differ, and no one word says them all
                    self._before = "highest"
                self._switches = [switch.fp32_precision for switch in _SWITCHES]
                torch.set_float32_matmul_precision("highest")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.set_float32_matmul_precision(self._before)
                for switch, value in zip(_SWITCHES, self._switches, strict=True):
                    switch.fp32_precision = value


_full_products = _FullProducts()


@contextmanager
def own_precision(model: Any) -> Iterator[None]:
    """Multiply float32 in full and without autocast in this thread; restore the modes at the end.

    It includes :func:`wide_products`, and takes the same argument.
    """
    with _full_products, torch.autocast(model.device.type, enabled=False), wide_products(model):
        yield


def is_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether products of this dtype are taken in float32 on this device."""
    return device.type == "cpu" and dtype in _NARROW and not has_fast_products(dtype)


def wide_products(model: Any) -> AbstractContextManager[object]:
    """Return a context that takes products in float32 where that is faster, and else does nothing.

    It holds for this thread. In the backward pass, the products that autograd makes of those in the
    context are in float32 as well; an ``autograd.Function`` with products of its own enters the
    context again. Tensors in eight bits and those that are spread over devices multiply as they do
    without it.

    Args:
        model: Model of assay or of transformers that runs in the context, or a tensor of its dtype
            on its device.
    """
    return _InFloat32() if is_wide(model.device, model.dtype) else nullcontext()


def has_fast_products(dtype: torch.dtype) -> bool:
    """Return whether torch has a fast product of this dtype for this machine's CPU."""
    if platform.machine() not in _X86:
        # Other processors have kernels of their own.
        return True
    kernels = torch.ops.mkldnn
    return bool(
        kernels._is_mkldnn_bf16_supported()
        if dtype == torch.bfloat16
        else kernels._is_mkldnn_fp16_supported()
    )


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
        product: Tensor = function(
            *map(_wide, args), **{name: _wide(value) for name, value in named.items()}
        )
        return product.to(factors[0].dtype)


def _gains(x: Any, weight: Any) -> bool:
    return _is_narrow(x) and _is_narrow(weight) and x.shape[:-1].numel() >= LEAST_ROWS


def _is_narrow(value: Any) -> bool:
    return type(value) in _PLAIN and value.dtype in _NARROW


def _wide(value: Any) -> Any:
    """Return a narrow tensor in float32, and anything else, such as a missing bias, as it is."""
    return value.float() if _is_narrow(value) else value
