"""Number formats and arrays, whichever library they come from: numpy and torch as one."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Array: TypeAlias = "npt.NDArray[Any] | torch.Tensor"

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


def as_tensor(array: Array) -> torch.Tensor:
    """Return a tensor over the memory of a numpy array (bfloat16 included), or the tensor that was given."""
    import torch

    if isinstance(array, torch.Tensor):
        return array
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def digest(array: Array) -> str:
    """Return the SHA-256 (hex) of the elements as little-endian bytes in row-major order, equal for every backend."""
    if not isinstance(array, np.ndarray):
        tensor = array.detach().cpu()
        array = tensor.view(torch_dtype("int16")).numpy() if dtype_name(tensor.dtype) == "bfloat16" else tensor.numpy()
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return hashlib.sha256(little.reshape(-1).view(np.uint8).data).hexdigest()
