"""Sketches of a response: of the state that gave its first token, and of every 32nd after it."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float16
from numpy.typing import NDArray
from torch import Tensor

from assay.errors import not_finite
from assay.poc import protocol
from assay.poc.protocol.pipelines import SKETCH_SIZE
from assay.poc.responses.sampling import step_seeds

_ROWS = 64  # projections made at a time: 12 · D normals each


def sketches(
    hidden_SD: Float[Tensor, "S D"], words: NDArray[np.uint32], steps: Sequence[int]
) -> Float16[Tensor, "S K"]:
    """Return the sketches of states, on their device.

    Args:
        hidden_SD: Hidden states after the final norm that gave the tokens of the steps.
        words: Words of the response's seed for the stream ``sketch``, uint32 [8].
        steps: Steps of the states.

    Raises:
        BadWeights: A state is NaN or infinite.
    """
    if not bool(torch.isfinite(hidden_SD).all()):
        raise not_finite("a hidden state that is NaN or infinite")
    seeds_S = step_seeds(words, steps)
    parts = [
        protocol.sketches(hidden_SD[start : start + _ROWS], seeds_S[start : start + _ROWS])
        for start in range(0, len(seeds_S), _ROWS)
    ]
    return torch.cat(parts) if parts else torch.empty((0, SKETCH_SIZE), dtype=torch.float16)
