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
from assay.poc.protocol.pipelines import SKETCH_SIZE
from assay.poc.protocol.transforms import random_projection, unit
from assay.streams.backends import as_tensor


@torch.inference_mode()
def sketches(states_SD: Float[Tensor, "S D"], seeds_S: NDArray[np.uint32]) -> Float16[Tensor, "S K"]:
    """Return unit(P · unit(h)) of every state, with P [12, D] the normals of its seed, on the device of the states.

    Args:
        states_SD: Hidden states h after the final norm.
        seeds_S: Seed of the projection of each.
    """
    backend = streams.get_backend("auto", str(states_SD.device))
    normals_SN = as_tensor(backend.normals(seeds_S, SKETCH_SIZE * states_SD.shape[1]))
    return unit(random_projection(unit(states_SD.float()), normals_SN, SKETCH_SIZE)).to(torch.float16)
