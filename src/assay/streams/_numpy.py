"""The numpy backend: the definition itself behind the common interface, slow and plain. The others are tested by it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from assay.streams import _definition
from assay.streams._arrays import Array, numpy_dtype
from assay.streams._backend import Backend


class NumpyBackend(Backend):
    """The definition in numpy."""

    name = "numpy"
    device = "cpu"

    def _hashes(self, seeds_B: npt.NDArray[np.uint32], n: int) -> Array:
        return _definition.hashes(seeds_B, 0, n)

    def _uniforms(self, seeds_B: npt.NDArray[np.uint32], n: int) -> Array:
        return _definition.uniforms(seeds_B, 0, n)

    def _signs(self, seeds_B: npt.NDArray[np.uint32], n: int) -> Array:
        return _definition.signs(seeds_B, n)

    def _permutations(self, seeds_B: npt.NDArray[np.uint32], n: int) -> Array:
        return _definition.permutations(seeds_B, n)

    def _picks(self, seeds_B: npt.NDArray[np.uint32], n: int, k: int) -> Array:
        return _definition.picks(seeds_B, n, k)

    def _normals(self, seeds_BS: npt.NDArray[np.uint32], n: int, dtype: str) -> Array:
        return _definition.normals(seeds_BS, n).astype(numpy_dtype(dtype), copy=False)


def create(device: str) -> NumpyBackend:
    """Return the backend; :func:`assay.streams.get_backend` refuses any other device than the CPU."""
    return NumpyBackend()
