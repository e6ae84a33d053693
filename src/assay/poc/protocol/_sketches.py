"""Sketches: a few numbers of the hidden state behind every 32nd token, by a projection that is drawn for the token.

Whoever prefills prompt and tokens once has the same states, and so the same sketches up to rounding. A projection that
is not known before the seed is leaves nothing to prepare, and reads all coordinates of the state alike.

Legend of shapes: S sketches, D hidden size, K numbers of a sketch.
"""

import numpy as np
import torch
from jaxtyping import Float, Float16
from numpy.typing import NDArray
from torch import Tensor

from assay import streams
from assay.poc.protocol._pipelines import SKETCH_SIZE
from assay.poc.protocol._transforms import unit


@torch.inference_mode()
def sketches(states_SD: Float[Tensor, "S D"], seeds_S: NDArray[np.uint32]) -> Float16[Tensor, "S K"]:
    """Return unit(P · unit(h)) of every state, with P [12, D] the normals of its seed, on the device of the states.

    Args:
        states_SD: Hidden states h after the final norm.
        seeds_S: Seed of the projection of each.
    """
    count, size = states_SD.shape
    backend = streams.get_backend("auto", str(states_SD.device))
    p_SKD = streams.as_tensor(backend.normals(seeds_S, SKETCH_SIZE * size)).view(count, SKETCH_SIZE, size)
    return unit(torch.bmm(p_SKD, unit(states_SD.float()).unsqueeze(2)).squeeze(2)).to(torch.float16)
