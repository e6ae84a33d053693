"""Numpy arrays and torch tensors as one: results of any backend to tensors, and to SHA-256."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    from assay.streams._backend import Array


def as_tensor(array: Array) -> torch.Tensor:
    """A torch tensor over the same memory as a numpy array (bfloat16 included), or the tensor that was given."""
    import torch

    if isinstance(array, torch.Tensor):
        return array
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def digest(array: Array) -> str:
    """SHA-256 (hex) of the elements as little-endian bytes in row-major order: the same for every backend."""
    flat: npt.NDArray[Any] = array if isinstance(array, np.ndarray) else _to_numpy(array)
    little = np.ascontiguousarray(flat, dtype=flat.dtype.newbyteorder("<"))
    return hashlib.sha256(little.reshape(-1).view(np.uint8).data).hexdigest()


def _to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy()
    return tensor.numpy()
