"""The one table of number formats: how this package, safetensors, numpy and torch name each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "STORED_DTYPES", "dtype_name", "numpy_dtype", "torch_dtype"]

DTYPES = ("float32", "float16", "bfloat16")
"""Formats of normals and of weights. The two short ones are the float32 values rounded once, to nearest even."""

STORED_DTYPES = dict(zip(("F32", "F16", "BF16"), DTYPES, strict=True))
"""Each of :data:`DTYPES` by the name that the header of a safetensors file has for it."""


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of that name."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy dtype of that name; bfloat16 is that of ml_dtypes."""
    return np.dtype(getattr(ml_dtypes, name, name))


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a torch dtype, for example ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")
