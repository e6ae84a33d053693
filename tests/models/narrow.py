"""What tests of products in float32 share: a CPU without fast narrow ones, and what reaches the
kernels of torch.
"""

from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from assay.models import Model, load_model, precision

_NARROW = (torch.bfloat16, torch.float16)
_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear)


class Products(TorchDispatchMode):
    """Collects the matrix products that reach the kernels of torch: narrow ones, apart if of few
    rows, and others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.narrow: list[str] = []
        self.few: list[str] = []
        self.wide: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.overloadpacket in _PRODUCTS:
            few = args[0].shape[:-1].numel() < precision.LEAST_ROWS
            products = (self.few if few else self.narrow) if args[0].dtype in _NARROW else self.wide
            products.append(f"{function} of {[tuple(factor.shape) for factor in args[:2]]}")
        return function(*args, **(kwargs or {}))


def narrow_model(path: Path) -> Model:
    """Return a checkpoint in bfloat16 on the CPU."""
    return load_model(path, dtype="bfloat16", device="cpu")
