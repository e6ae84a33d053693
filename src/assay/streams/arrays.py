"""Arrays of numpy and tensors of torch, handled alike; torch is imported on first use."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Array: TypeAlias = "npt.NDArray[Any] | torch.Tensor"

DTYPES = ("float32", "float16", "bfloat16")
"""Formats of normals and of weights.

The two short ones are the float32 values rounded once, to nearest even.
"""


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of that name."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a torch dtype, for example ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def as_tensor(array: Array) -> torch.Tensor:
    """Return a tensor that shares the memory of a numpy array; a tensor is returned as it is."""
    import torch

    return array if isinstance(array, torch.Tensor) else torch.from_numpy(array)


def digest(array: Array) -> str:
    """Return the SHA-256 (hex) of the elements as little-endian bytes in row-major order.

    It is equal for every backend.
    """
    if not isinstance(array, np.ndarray):
        tensor = array.detach().cpu()
        if dtype_name(tensor.dtype) == "bfloat16":  # which numpy lacks
            tensor = tensor.view(torch_dtype("int16"))
        array = tensor.numpy()
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return hashlib.sha256(little.reshape(-1).view(np.uint8).data).hexdigest()
