"""The chain's decode proof: a normalised state as the nearest of sixteen points, step by step.

Step 0 reads the state behind the prompt. Step t reads the state behind the input that the point of
step t − 1 seeds, and takes the coordinates that this point seeds. docs/decode.md is the definition.

Legend of shapes: B nonces of a batch, T steps in a row, D hidden size, K coordinates that are read,
Q points.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8, UInt32
from numpy.typing import NDArray
from torch import Tensor

from assay import streams
from assay.errors import UsageError
from assay.poc.protocol.pipelines import SPHERE_POINTS, SPHERE_SIZE
from assay.poc.protocol.round import Input, seed_texts
from assay.poc.protocol.transforms import project, unit
from assay.streams import definition
from assay.streams.arrays import as_tensor, dtype_name

_PREVIOUS_FACTOR = np.uint32(0x9E3779B1)
_STEP_FACTOR = np.uint32(0x85EBCA77)
_INPUT_SALT = np.uint32(0x0D)
_PICK_SALT = np.uint32(0x91)


@cache
def sphere_points() -> NDArray[np.float32]:
    """Return the sixteen points, unit vectors [16, 256].

    They follow the network's construction (the start of a Halton sequence, then repulsion) in
    float64. The network's own file was made in float32 on one machine, and only its checksum is
    public. Two such builds differ by 6e-5 in a coordinate, which moves a cosine by about as much.
    """
    raw = (Path(__file__).parent / "sphere_points.f32").read_bytes()
    return np.frombuffer(raw, "<f4").astype(np.float32).reshape(SPHERE_POINTS, SPHERE_SIZE)


def chained_seeds(
    bases_B: UInt32[np.ndarray, " B"],
    previous_BT: UInt8[np.ndarray, "B T"],
    first: int,
    salt: np.uint32,
) -> UInt32[np.ndarray, "B T"]:
    """Return the seeds of the steps from ``first`` on, each of the nonce's seed, the step and the
    point before it.
    """
    steps_T = np.arange(first, first + previous_BT.shape[1], dtype=np.uint32)
    keys_BT = previous_BT.astype(np.uint32) * _PREVIOUS_FACTOR + (steps_T * _STEP_FACTOR + salt)
    return definition.step_seeds(bases_B[:, None], keys_BT)


def coordinate_order(picks_MK: Int64[Tensor, "M K"]) -> Int64[Tensor, "M K"]:
    """Return picked coordinates in the order in which they meet those of a point.

    The network takes them as an unsorted ``topk`` of torch on CUDA leaves them: the coordinate with
    the largest of the chosen hashes last, and the others in ascending order. On a CPU the same call
    leaves another order.
    """
    return torch.cat([picks_MK[:, :-1].sort(dim=1).values, picks_MK[:, -1:]], dim=1)


class Chain:
    """Inputs and readings of the steps of a batch of nonces.

    Raises:
        UsageError: The model has states of fewer numbers than a step reads.
    """

    def __init__(
        self, inputs: Sequence[Input], *, hidden_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        if hidden_size < SPHERE_SIZE:
            raise UsageError(
                f"the chain's decode proof with states of {hidden_size} numbers",
                wanted=f"a model with {SPHERE_SIZE} or more",
                do="choose another preset, such as decode",
            )
        self.inputs = inputs
        self._size = hidden_size
        self._dtype = dtype_name(dtype)
        self._device = device
        self._backend = streams.get_backend("auto", str(device))
        self._bases_B = streams.seeds(seed_texts(inputs, "inputs")).reshape(-1)
        self._first_B = streams.seeds(seed_texts(inputs, "first_pick", k=SPHERE_SIZE)).reshape(-1)
        self._points_QK = torch.from_numpy(sphere_points()).to(device)

    def embeddings(
        self, previous_BT: UInt8[np.ndarray, "B T"], first: int
    ) -> Float[Tensor, "B T D"]:
        """Return the inputs of the steps from ``first`` on, at least 1, after the points before
        them.
        """
        count, length = previous_BT.shape
        seeds_BT = chained_seeds(self._bases_B, previous_BT, first, _INPUT_SALT)
        values = self._backend.normals(seeds_BT.reshape(-1), self._size, self._dtype)
        return as_tensor(values).view(count, length, self._size)

    def scores(
        self,
        states_BTD: Float[Tensor, "B T D"],
        previous_BT: UInt8[np.ndarray, "B T"],
        first: int = 0,
    ) -> Float32[Tensor, "B T Q"]:
        """Return the cosines of states with all points, of the steps from ``first`` on.

        ``previous_BT`` has the points of the steps before; step 0 has none, and any value there.
        """
        seeds_BT = chained_seeds(self._bases_B, previous_BT, first, _PICK_SALT)
        if first == 0:
            seeds_BT[:, 0] = self._first_B
        picks_MK = as_tensor(self._backend.picks(seeds_BT.reshape(-1), self._size, SPHERE_SIZE))
        order_MK = coordinate_order(picks_MK.to(self._device))
        read_MK = unit(states_BTD.float()).flatten(0, 1).gather(1, order_MK)
        return project(unit(read_MK), self._points_QK).view(*states_BTD.shape[:2], SPHERE_POINTS)
