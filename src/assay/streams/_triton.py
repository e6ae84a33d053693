"""The triton backend: fused kernels on CUDA, one pass over memory for a whole batch.

Every call is queued on torch's current stream and returns without waiting for the device. The kernels, and why they
give the bits of the definition, are in :mod:`assay.streams._triton_kernels`.

Shapes: ``B`` streams of a batch, ``N`` elements of each, ``S`` sub-seeds of a stream, ``D`` coordinates, ``R``
reflections.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton

from assay.errors import BackendUnavailable
from assay.streams import _definition as definition
from assay.streams import _triton_kernels as kernels
from assay.streams._torch import TORCH_DTYPES, TorchBackend, on_device
from assay.streams._torch import create as create_torch

BLOCK, WARPS, TOGETHER = 1024, 4, 4
"""Pairs of a program, its warps, and over how many rows at most it keeps what the index gives to the hash."""

_FULL = 132 * 8
_GRID = 65_535
"""CUDA's limit of the second and third axis of a grid."""

_MAX_REFLECTED = 16_384
_HASH_BLOCK = 1024


class TritonBackend(TorchBackend):
    """Fused kernels for hashes, uniforms, signs, normals and reflections; torch sorts for permutations and picks."""

    name = "triton"

    def reflected(self, x_BD: torch.Tensor, seeds_BR: npt.NDArray[np.uint32]) -> torch.Tensor | None:
        """In one kernel, for rows of up to 16 384 coordinates in float32; the sums have a fixed order for each D."""
        rows, d = x_BD.shape
        if x_BD.dtype != torch.float32 or not 0 < d <= _MAX_REFLECTED or not rows:
            return None
        x_BD = x_BD.contiguous()
        out_BD = torch.empty_like(x_BD)
        block = max(32, triton.next_power_of_2(-(-d // 2)))
        self._launch(
            kernels.reflect_kernel,
            (rows,),
            on_device(seeds_BR, self.device),
            x_BD,
            out_BD,
            d,
            seeds_BR.shape[1],
            BLOCK=block,
            num_warps=min(16, max(1, block // 128)),
        )
        return out_BD

    def _uniforms(self, seeds_B: npt.NDArray[np.uint32], n: int) -> torch.Tensor:
        return self._from_hashes("uniform", torch.float32, seeds_B, n)

    def _signs(self, seeds_B: npt.NDArray[np.uint32], n: int) -> torch.Tensor:
        return self._from_hashes("sign", torch.int8, seeds_B, n)

    def _signed_hashes(self, seeds_B: npt.NDArray[np.uint32], n: int) -> torch.Tensor:
        return self._from_hashes("hash", torch.int32, seeds_B, n)

    def _ordered_hashes(self, seeds_B: npt.NDArray[np.uint32], n: int) -> torch.Tensor:
        return self._from_hashes("order", torch.int32, seeds_B, n)

    def _from_hashes(self, kind: str, dtype: torch.dtype, seeds_B: npt.NDArray[np.uint32], n: int) -> torch.Tensor:
        out_BN = torch.empty((len(seeds_B), n), dtype=dtype, device=self.device)
        if out_BN.numel():
            seeds = on_device(seeds_B, self.device)
            for start in range(0, len(seeds_B), _GRID):
                part = slice(start, start + _GRID)
                grid = (triton.cdiv(n, _HASH_BLOCK), len(out_BN[part]))
                self._launch(kernels.hash_kernel, grid, seeds[part], out_BN[part], n, KIND=kind, BLOCK=_HASH_BLOCK)
        return out_BN

    def _normals(self, seeds_BS: npt.NDArray[np.uint32], n: int, dtype: str) -> torch.Tensor:
        rows, sub_seeds = seeds_BS.shape
        out_BN = torch.empty((rows, n), dtype=TORCH_DTYPES[dtype], device=self.device)
        if out_BN.numel():
            seeds = on_device(seeds_BS, self.device)
            length = definition.segment_length(n, sub_seeds)
            full, rest = divmod(n, length)
            self._fill(seeds, out_BN, length, length, full)
            if rest:
                self._fill(seeds[:, full:], out_BN[:, full * length :], length, rest, 1)
        return out_BN

    def _fill(self, seeds_BS: torch.Tensor, out_BN: torch.Tensor, length: int, count: int, sub_seeds: int) -> None:
        """Make ``count`` normals of the first ``sub_seeds`` sub-seeds of every row, ``length`` apart."""
        rows, n = len(out_BN), out_BN.stride(0)
        pairs = -(-count // 2)
        lengths = (n, length, pairs, count - pairs)
        unit = 16 if not any(value % 16 for value in lengths) else 1
        blocks = triton.cdiv(pairs, BLOCK)
        together = max(1, min(TOGETHER, blocks * sub_seeds * rows // _FULL))
        for start in range(0, rows, _GRID * together):
            part = slice(start, start + _GRID * together)
            groups = triton.cdiv(len(out_BN[part]), together)
            self._launch(
                kernels.normal_kernel,
                (blocks, groups, sub_seeds),
                seeds_BS[part],
                out_BN[part],
                len(out_BN[part]),
                together,
                seeds_BS.stride(0),
                *(value // unit for value in lengths),
                UNIT=unit,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )

    def _launch(self, kernel: triton.JITFunction, grid: tuple[int, ...], *arguments: object, **options: object) -> Any:
        """Queue a kernel, and return what was compiled for these arguments."""
        with torch.cuda.device(self.device):
            return kernel[grid](*arguments, **options, enable_fp_fusion=False)


def create(device: str) -> TritonBackend:
    """The triton backend.

    Raises:
        BackendUnavailable: the device is not a CUDA one that is there.
    """
    if device == "cpu":
        raise BackendUnavailable(
            "backend triton on the cpu", wanted="a CUDA device", do="use backend numba, the fast one on the CPU"
        )
    create_torch(device)  # refuses devices that are not there
    return TritonBackend(device)
