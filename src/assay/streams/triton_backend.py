"""The triton backend: fused kernels on CUDA, one pass over memory for a whole batch.

Every call is queued on torch's current stream and returns without waiting for the device. The kernels, and why they
give the bits of the definition, are in :mod:`assay.streams.triton_kernels`.

Shapes: ``B`` streams of a batch, ``N`` elements of each, ``S`` sub-seeds of a stream, ``D`` coordinates, ``R``
reflections.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
import triton

from assay.errors import BackendUnavailable
from assay.streams import definition
from assay.streams import triton_kernels as kernels
from assay.streams.backends import WORDS, torch_dtype
from assay.streams.definition import UInts
from assay.streams.torch_backend import TorchBackend, on_device

BLOCK, WARPS = 4096, 16
"""Pairs of a program, and its warps."""

TOGETHER, PROGRAMS = 8, 128
"""A program keeps what the index gives to the hash over 8 rows, over fewer where that leaves less than 128 programs."""

_GRID = 65_535
"""CUDA's limit of the second and third axis of a grid."""

_MAX_REFLECTED = 16_384
"""Coordinates of a row that one program can hold in its registers."""

_HASH_BLOCK, _SEED_BLOCK = 1024, 128


class TritonBackend(TorchBackend):
    """Fused kernels for everything but permutations and picks, for which torch sorts the hashes."""

    name = "triton"

    def __init__(self, device: str) -> None:
        if device == "cpu":
            raise BackendUnavailable("backend triton on the cpu", wanted="a CUDA device", do="use backend torch there")
        super().__init__(device)
        self._numbered = torch.device(device).index is not None

    def _reflected(self, x_BD: torch.Tensor, seeds_BR: UInts) -> torch.Tensor | None:
        rows, d = x_BD.shape
        if not (x_BD.is_cuda and x_BD.dtype == torch.float32 and rows and 0 < d <= _MAX_REFLECTED):
            return None
        x_BD = x_BD.contiguous()
        out_BD = torch.empty_like(x_BD)
        block = max(32, 1 << (-(-d // 2) - 1).bit_length())  # the power of two that holds all pairs
        arguments = (on_device(seeds_BR, self.device), x_BD, out_BD, d, seeds_BR.shape[1])
        warps = min(16, max(1, block // 128))
        self._launch(kernels.reflect_kernel, (rows,), *arguments, BLOCK=block, num_warps=warps)
        return out_BD

    def _add_gumbels(self, scores_RV: torch.Tensor, seeds_N: torch.Tensor, rows_N: torch.Tensor | None) -> None:
        rows, columns = scores_RV.shape
        grid = (len(seeds_N) * -(-columns // _HASH_BLOCK),)
        numbers = seeds_N if rows_N is None else rows_N
        arguments = (seeds_N, numbers, scores_RV, rows, columns, scores_RV.stride(0))
        self._launch(kernels.add_gumbels_kernel, grid, *arguments, HAS_ROWS=rows_N is not None, BLOCK=_HASH_BLOCK)

    def _row_seeds(self, words_N8: torch.Tensor, steps_N: torch.Tensor) -> torch.Tensor:
        seeds_N = torch.empty(len(steps_N), dtype=torch.int32, device=steps_N.device)
        if len(steps_N):
            grid = (-(-len(steps_N) // _SEED_BLOCK),)
            arguments = (words_N8, steps_N, seeds_N, len(steps_N))
            self._launch(kernels.row_seeds_kernel, grid, *arguments, WORDS=WORDS, BLOCK=_SEED_BLOCK)
        return seeds_N

    def _from_hashes(self, kind: str, dtype: torch.dtype, seeds_B: UInts, n: int) -> torch.Tensor:
        out_BN = torch.empty((len(seeds_B), n), dtype=dtype, device=self.device)
        if out_BN.numel():
            for seeds, out in _grids(on_device(seeds_B, self.device), out_BN, _GRID):
                grid = (-(-n // _HASH_BLOCK), len(out))
                self._launch(kernels.hash_kernel, grid, seeds, out, n, KIND=kind, BLOCK=_HASH_BLOCK)
        return out_BN

    def _normals(self, seeds_BS: UInts, n: int, dtype: str) -> torch.Tensor:
        rows, sub_seeds = seeds_BS.shape
        out_BN = torch.empty((rows, n), dtype=torch_dtype(dtype), device=self.device)
        if rows and n:
            seeds = on_device(seeds_BS, self.device)
            length = definition.segment_length(n, sub_seeds)
            full, rest = divmod(n, length)
            for first in range(0, full, _GRID):
                here = min(_GRID, full - first)
                self._fill(seeds[:, first:], out_BN[:, first * length :], length, length, here)
            if rest:
                self._fill(seeds[:, full:], out_BN[:, full * length :], length, rest, 1)
        return out_BN

    def _fill(self, seeds_BS: torch.Tensor, out_BN: torch.Tensor, length: int, count: int, sub_seeds: int) -> None:
        """Make ``count`` normals of the first ``sub_seeds`` sub-seeds of every row, ``length`` apart."""
        pairs = -(-count // 2)
        lengths = (out_BN.stride(0), length, pairs, count - pairs)
        unit = 1 if any(value % 16 for value in lengths) else 16
        blocks = -(-pairs // BLOCK)
        together = TOGETHER
        while together > 1 and blocks * sub_seeds * len(out_BN) < PROGRAMS * together:
            together //= 2
        for seeds, out in _grids(seeds_BS, out_BN, _GRID * together):
            rows = len(out)
            self._launch(
                kernels.normal_kernel,
                (blocks, -(-rows // together), sub_seeds),
                *(seeds, out, rows, together, seeds.stride(0), *(value // unit for value in lengths)),
                UNIT=unit,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )

    def _launch(self, kernel: triton.JITFunction, grid: tuple[int, ...], *arguments: object, **options: object) -> Any:
        """Queue a kernel, and return what was compiled for these arguments."""
        with torch.cuda.device(self.device) if self._numbered else nullcontext():
            return kernel[grid](*arguments, **options, enable_fp_fusion=False)


def _grids(seeds: torch.Tensor, out_BN: torch.Tensor, rows: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Cut a batch into pieces of so many rows, mostly one."""
    if len(out_BN) <= rows:
        return ((seeds, out_BN),)
    return zip(torch.split(seeds, rows), torch.split(out_BN, rows), strict=True)
