"""Backends by name, their arrays, and the self-test that compares machines."""

import hashlib
import sys
import types

import numpy as np
import pytest
import torch

from assay.errors import BackendUnavailable, UsageError
from assay.streams import BACKENDS, get_backend, selftest
from assay.streams.arrays import as_tensor, digest
from assay.streams.self_test import SELFTEST_EXPECTED


def test_auto_is_torch_on_the_cpu():
    assert get_backend().name == "torch"
    assert get_backend().device == "cpu"


DEVICES = ("gpu", "cuda:", "cuda:x", "cuda:007", "cuda:٣", "cuda:128", "cuda:99999999999", "")
REFUSED = [
    *((UsageError, "name", (name,)) for name in ("Torch", "cuda", "", "murmur", "numba")),
    *((UsageError, "device", ("torch", device)) for device in DEVICES),
    (UsageError, "device", ("numpy", "cuda")),  # the definition stays on the CPU
    *((BackendUnavailable, "", (name, "cuda:99")) for name in ("torch", "auto")),
]


@pytest.mark.parametrize(("error", "field", "arguments"), REFUSED)
def test_unknown_names_and_absent_devices(error, field, arguments):
    with pytest.raises(error) as refusal:
        get_backend(*arguments)
    assert refusal.value.field == field


def test_a_backend_whose_packages_are_absent(monkeypatch):
    def absent(name):
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr("importlib.import_module", absent)
    for name in set(BACKENDS) - {"numpy"}:
        with pytest.raises(BackendUnavailable) as refusal:
            get_backend(name)
        assert "No module named 'triton'" in refusal.value.seen


def test_auto_on_cuda_takes_triton_where_it_runs(monkeypatch):
    made = object()
    stand_in = types.ModuleType("assay.streams.triton_backend")
    stand_in.TritonBackend = lambda device: made
    monkeypatch.setitem(sys.modules, "assay.streams.triton_backend", stand_in)
    assert get_backend("auto", "cuda") is made
    assert get_backend("triton", "cuda:1") is made


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.uint32, np.int8])
def test_digest_of_array_and_tensor(dtype):
    array = np.array([[1, 2, 3], [4, 5, 6]]).astype(dtype)
    expected = hashlib.sha256(array.tobytes()).hexdigest()
    assert digest(array) == digest(as_tensor(array)) == expected
    assert digest(np.asfortranarray(array)) == expected
    assert digest(as_tensor(array.T.copy()).T) == expected


def test_digest_of_bfloat16_is_that_of_its_bytes():
    values = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    assert digest(values) == hashlib.sha256(values.view(torch.int16).numpy().tobytes()).hexdigest()


def test_tensors_and_arrays_share_memory():
    array = np.ones(3)
    tensor = as_tensor(array)
    assert as_tensor(tensor) is tensor
    array[1] = 2
    assert tensor.tolist() == [1, 2, 1]


def test_every_backend_passes(backend):
    assert selftest(backend) == SELFTEST_EXPECTED


def test_a_wrong_backend_is_found(definition):
    class OneBitOff(type(definition)):
        def normals(self, seeds_BS, n, dtype="float32"):
            normals = super().normals(seeds_BS, n, dtype)
            as_tensor(normals).view(torch.int16)[-1, -1] ^= 1
            return normals

    found = selftest(OneBitOff("cpu"))
    assert {name for name in found if found[name] != SELFTEST_EXPECTED[name]} == {
        name for name in SELFTEST_EXPECTED if name.startswith("normal")
    }
