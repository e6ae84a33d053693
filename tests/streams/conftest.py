import pytest

from assay.errors import BackendUnavailable
from assay.streams import get_backend

CPU = [("numpy", "cpu"), ("torch", "cpu")]
GPU = [
    pytest.param(pair, marks=pytest.mark.gpu) for pair in (("torch", "cuda"), ("triton", "cuda"))
]


def _name(pair):
    return "-".join(pair)


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
