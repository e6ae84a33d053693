import hashlib

import ml_dtypes
import numpy as np
import pytest
import torch

from assay.streams import DTYPES, get_backend
from assay.streams.backends import as_tensor, digest

VALUES = [1.5, -2.0, 0.25]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensor_over_the_same_memory(dtype):
    array = get_backend("numba").normals([1], 10, dtype)
    tensor = as_tensor(array)
    assert tensor.dtype == getattr(torch, dtype)
    array[0, 3] = 2.5
    assert tensor[0, 3].item() == 2.5
    assert tensor.float().tolist() == array.astype(np.float32).tolist()


def test_tensors_pass_through():
    tensor = torch.ones(3)
    assert as_tensor(tensor) is tensor


def test_hashes_keep_their_unsigned_type():
    assert as_tensor(get_backend("numba").hashes([1], 4)).dtype == torch.uint32
    assert get_backend("torch").hashes([1], 4).dtype == torch.uint32


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint32, np.int8])
def test_digest_of_array_and_tensor(dtype):
    array = np.array([[1, 2, 3], [4, 5, 6]]).astype(dtype)
    expected = hashlib.sha256(array.tobytes()).hexdigest()
    assert digest(array) == digest(as_tensor(array)) == expected
    assert digest(np.asfortranarray(array)) == expected
    assert digest(as_tensor(array.T.copy()).T) == expected


def test_digest_is_little_endian():
    assert (
        digest(np.array([1, 2], ">u4"))
        == digest(np.array([1, 2], "<u4"))
        == hashlib.sha256(bytes([1, 0, 0, 0, 2, 0, 0, 0])).hexdigest()
    )


def test_digest_of_nothing():
    assert digest(np.zeros((2, 0), np.float32)) == digest(torch.zeros(2, 0)) == hashlib.sha256().hexdigest()
