"""How much of a dear simulation runs: a part of it, or all of it in `make soak`."""

import pytest


@pytest.fixture(
    params=[pytest.param(4, id="part"), pytest.param(1, id="whole", marks=pytest.mark.soak)]
)
def fewer(request: pytest.FixtureRequest) -> int:
    """Divisor of the number of repeats."""
    return int(request.param)
