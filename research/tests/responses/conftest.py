"""A small scene: the small checkpoint in float32, four requests of 112 tokens."""

from pathlib import Path

import pytest
from assay_research.responses.cheats import Scene
from assay_research.responses.provers import Requests, make_requests

from assay.poc.responses import Sampling

STEPS = 112


@pytest.fixture(scope="session")
def scene(small_checkpoint: Path) -> Scene:
    return Scene(str(small_checkpoint), "float32", "cpu")


@pytest.fixture(scope="session")
def requests(small_model) -> Requests:
    # Sharp enough for tokens to depend on the logits of random weights.
    sampling = Sampling(temperature=0.1, top_p=0.95)
    return make_requests(small_model, 4, prompt_tokens=16, steps=STEPS, sampling=sampling)
