"""How much of a dear simulation runs: a part of it by default, all of it under the marker
``slow``.
"""

import pytest


@pytest.fixture(
    params=[pytest.param(4, id="part"), pytest.param(1, id="whole", marks=pytest.mark.slow)]
)
def fewer(request: pytest.FixtureRequest) -> int:
    """Divisor of the number of repeats."""
    return int(request.param)
