import sys
import types

import pytest
import torch

from assay.errors import BackendUnavailable, UsageError
from assay.streams import BACKENDS, Backend, get_backend
from assay.streams import backends as _registry


def test_auto_is_the_compiled_one_on_the_cpu():
    assert get_backend().name == "numba"
    assert get_backend().device == "cpu"


@pytest.mark.parametrize("name", ["numpy", "numba", "torch"])
def test_by_name(name):
    backend = get_backend(name)
    assert isinstance(backend, Backend)
    assert (backend.name, backend.device) == (name, "cpu")


@pytest.mark.parametrize("name", ["Numba", "cuda", "", "murmur"])
def test_unknown_name(name):
    with pytest.raises(UsageError, match="numpy, numba, torch, triton"):
        get_backend(name)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:007", "cuda:٣", "cuda:128", "cuda:99999999999", ""])
def test_unknown_device(device):
    with pytest.raises(UsageError, match="cpu, cuda or cuda:<number>"):
        get_backend("torch", device)


@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_cpu_backends_stay_on_the_cpu(name):
    with pytest.raises(UsageError, match="device cpu"):
        get_backend(name, "cuda")


@pytest.mark.parametrize("name", ["torch", "auto"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(BackendUnavailable, match="cuda:99"):
        get_backend(name, "cuda:99")


def test_a_backend_whose_packages_are_absent(monkeypatch):
    def absent(name):
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(_registry.importlib, "import_module", absent)
    for name in set(BACKENDS) - {"numpy"}:
        with pytest.raises(BackendUnavailable) as caught:
            get_backend(name)
        assert caught.value.seen == f"backend {name}: No module named 'triton'"
        assert caught.value.wanted
        assert "auto" in caught.value.do


def test_auto_on_cuda_takes_triton_where_it_runs(monkeypatch):
    made = object()
    stand_in = types.ModuleType("assay.streams.triton_backend")
    stand_in.TritonBackend = lambda device: made
    monkeypatch.setitem(sys.modules, "assay.streams.triton_backend", stand_in)
    assert get_backend("auto", "cuda") is made
    assert get_backend("triton", "cuda:1") is made


@pytest.mark.gpu
def test_auto_on_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert get_backend("auto", "cuda").name in ("triton", "torch")
