"""The triton backend: fused kernels on CUDA, one pass over memory for a whole batch.

Every call is queued on torch's current stream and returns without waiting for the device.
:mod:`assay.streams.triton_kernels` states their gain.

Shapes: ``B`` streams of a batch, ``N`` elements of each, ``S`` sub-seeds of a stream, ``D``
coordinates, ``R`` reflections. Where noise is added: ``N`` rows that get it, of ``R`` rows of
scores and ``V`` columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
import triton

from assay.errors import BackendUnavailable
from assay.streams import definition
from assay.streams.arrays import torch_dtype
from assay.streams.backends import WORDS
from assay.streams.definition import UInts
from assay.streams.torch_backend import DTYPES_OF_KINDS, TorchBackend, on_device
from assay.streams.triton_kernels import (
    add_gumbels_kernel,
    hash_kernel,
    normal_kernel,
    reflect_kernel,
    row_seeds_kernel,
)

LARGEST_GRID = 65_535
"""CUDA's limit of the second and third axis of a grid."""

_PAIRS = 4096  # of normals of a program
_WARPS = 16
# A program uses what the index contributes to the hash for 8 rows, and for fewer where that would
# leave less than 128 programs.
_ROWS_OF_PROGRAM = 8
_FEWEST_PROGRAMS = 128

# Coordinates of a row that one program can hold in its registers.
_LARGEST_REFLECTED = 16_384
_HASH_BLOCK = 1024
_SEED_BLOCK = 128


class TritonBackend(TorchBackend):
    """Fused kernels for everything but permutations and picks, for which torch sorts the hashes."""

    name = "triton"

    def __init__(self, device: str) -> None:
        if device == "cpu":
            raise BackendUnavailable(
                "backend triton on the cpu", wanted="a CUDA device", do="use backend torch there"
            )
        super().__init__(device)
        self._has_number = torch.device(device).index is not None

    def launch(
        self,
        kernel: triton.JITFunction,
        grid: tuple[int, ...],
        *arguments: object,
        **options: object,
    ) -> Any:
        """Queue a kernel on this device, and return what was compiled for these arguments."""
        with torch.cuda.device(self.device) if self._has_number else nullcontext():
            # A fused multiply-add rounds once where the definition rounds twice.
            return kernel[grid](*arguments, **options, enable_fp_fusion=False)

    def _reflected(self, x_BD: torch.Tensor, seeds_BR: UInts) -> torch.Tensor | None:
        rows, d = x_BD.shape
        is_supported = x_BD.is_cuda and x_BD.dtype == torch.float32
        if not (is_supported and rows and 0 < d <= _LARGEST_REFLECTED):
            return None
        x_BD = x_BD.contiguous()
        out_BD = torch.empty_like(x_BD)
        # The power of two that holds all pairs.
        block = max(32, 1 << (-(-d // 2) - 1).bit_length())
        seeds = on_device(seeds_BR, self.device)
        arguments = (seeds, x_BD, out_BD, d, seeds_BR.shape[1])
        warps = min(16, max(1, block // 128))
        self.launch(reflect_kernel, (rows,), *arguments, BLOCK=block, num_warps=warps)
        return out_BD

    def _add_gumbels(
        self, scores_RV: torch.Tensor, seeds_N: torch.Tensor, rows_N: torch.Tensor | None
    ) -> None:
        rows, columns = scores_RV.shape
        grid = (len(seeds_N) * -(-columns // _HASH_BLOCK),)
        numbers = seeds_N if rows_N is None else rows_N
        arguments = (seeds_N, numbers, scores_RV, rows, columns, scores_RV.stride(0))
        self.launch(
            add_gumbels_kernel, grid, *arguments, HAS_ROWS=rows_N is not None, BLOCK=_HASH_BLOCK
        )

    def _row_seeds(self, words_N8: torch.Tensor, steps_N: torch.Tensor) -> torch.Tensor:
        rows = len(steps_N)
        seeds_N = torch.empty(rows, dtype=torch.int32, device=steps_N.device)
        if rows:
            grid = (-(-rows // _SEED_BLOCK),)
            arguments = (words_N8, steps_N, seeds_N, rows)
            self.launch(row_seeds_kernel, grid, *arguments, WORDS=WORDS, BLOCK=_SEED_BLOCK)
        return seeds_N

    def _from_hashes(self, kind: str, seeds_B: UInts, n: int) -> torch.Tensor:
        out_BN = torch.empty(
            (len(seeds_B), n), dtype=DTYPES_OF_KINDS.get(kind, torch.int32), device=self.device
        )
        if out_BN.numel():
            for seeds, out in _grids(on_device(seeds_B, self.device), out_BN, LARGEST_GRID):
                grid = (-(-n // _HASH_BLOCK), len(out))
                self.launch(hash_kernel, grid, seeds, out, n, KIND=kind, BLOCK=_HASH_BLOCK)
        return out_BN

    def _normals(self, seeds_BS: UInts, n: int, dtype: str) -> torch.Tensor:
        rows, sub_seeds = seeds_BS.shape
        out_BN = torch.empty((rows, n), dtype=torch_dtype(dtype), device=self.device)
        if rows and n:
            seeds = on_device(seeds_BS, self.device)
            length = definition.segment_length(n, sub_seeds)
            full, remainder = divmod(n, length)
            for first in range(0, full, LARGEST_GRID):
                count = min(LARGEST_GRID, full - first)
                self._fill(seeds[:, first:], out_BN[:, first * length :], length, length, count)
            if remainder:
                self._fill(seeds[:, full:], out_BN[:, full * length :], length, remainder, 1)
        return out_BN

    def _fill(
        self, seeds_BS: torch.Tensor, out_BN: torch.Tensor, length: int, count: int, sub_seeds: int
    ) -> None:
        """Make ``count`` normals of each of the first sub-seeds of every row, ``length`` apart."""
        pairs = -(-count // 2)
        lengths = (out_BN.stride(0), length, pairs, count - pairs)
        # Lengths in whole units of 16 elements let the compiler store 16 bytes at a time.
        unit = 1 if any(value % 16 for value in lengths) else 16
        units = [value // unit for value in lengths]
        blocks = -(-pairs // _PAIRS)
        together = _ROWS_OF_PROGRAM
        while together > 1 and blocks * sub_seeds * len(out_BN) < _FEWEST_PROGRAMS * together:
            together //= 2
        for seeds, out in _grids(seeds_BS, out_BN, LARGEST_GRID * together):
            rows = len(out)
            grid = (blocks, -(-rows // together), sub_seeds)
            arguments = (seeds, out, rows, together, seeds.stride(0), *units)
            self.launch(normal_kernel, grid, *arguments, UNIT=unit, BLOCK=_PAIRS, num_warps=_WARPS)


def _grids(
    seeds: torch.Tensor, out_BN: torch.Tensor, rows: int
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Cut a batch into pieces of so many rows, mostly one piece."""
    if len(out_BN) <= rows:
        return ((seeds, out_BN),)
    return zip(torch.split(seeds, rows), torch.split(out_BN, rows), strict=True)
