import pytest
import torch

from assay.errors import BackendUnavailable
from assay.streams import get_backend

CPU = [("numpy", "cpu"), ("torch", "cpu")]
GPU = [pytest.param(pair, marks=pytest.mark.gpu) for pair in (("torch", "cuda"), ("triton", "cuda"))]


def _name(pair):
    return "-".join(pair)


@pytest.fixture(autouse=True)
def _one_torch_thread():
    """Torch's threads wait busily for each other: with several test processes on few cores that is all they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[*CPU, *GPU], ids=lambda pair: _name(pair))
def backend(request):
    """Every backend on every device it has here. Those of the CPU are never skipped."""
    name, device = request.param
    try:
        return get_backend(name, device)
    except BackendUnavailable as error:
        pytest.skip(f"{name} on {device}: {error.seen}")


@pytest.fixture(scope="session")
def definition():
    return get_backend("numpy")
