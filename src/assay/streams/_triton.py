"""The triton backend: hash, uniforms, logarithm, sine and square root of a pair in one kernel, written once to memory.

The formulas are those of :mod:`assay.streams._definition`, in its order. The kernels must be launched with
``enable_fp_fusion=False``: by default the compiler contracts a multiply and an add into one operation that rounds once.
``tl.sqrt_rn`` is the correctly rounded root; ``tl.sqrt`` is not.

Shapes: ``B`` streams of a batch, ``N`` elements of each, ``S`` sub-seeds of a stream.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from assay.errors import BackendUnavailable
from assay.streams import _definition as definition
from assay.streams._torch import _TORCH_DTYPES, TorchBackend, _signed
from assay.streams._torch import create as create_torch

_BLOCK = 1024
_WARPS = 4

_MIN_U1 = tl.constexpr(float(definition.MIN_U1))
_SQRT_HALF_BITS = tl.constexpr(int(definition.SQRT_HALF_BITS))
_LN2_HIGH = tl.constexpr(float(definition.LN2_HIGH))
_LN2_LOW = tl.constexpr(float(definition.LN2_LOW))
_ROUND_MAGIC = tl.constexpr(float(definition.ROUND_MAGIC))
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (tl.constexpr(float(c)) for c in definition.LN_POLY)
_S0, _S1, _S2, _S3 = (tl.constexpr(float(c)) for c in definition.SIN_POLY)
_C0, _C1, _C2, _C3 = (tl.constexpr(float(c)) for c in definition.COS_POLY)


@triton.jit
def _hash(seed, index):
    k = index.to(tl.uint32) * 0xCC9E2D51
    k = (k << 15) | (k >> 17)
    k = k * 0x1B873593
    h = seed ^ k
    h = (h << 13) | (h >> 19)
    h = h * 5 + 0xE6546B64
    h = h ^ (h >> 16)
    h = h * 0x85EBCA6B
    h = h ^ (h >> 13)
    h = h * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _negative_log(u):
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    k = (-exponent).to(tl.float32)
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = f * _L0 + _L1
    p = p * f + _L2
    p = p * f + _L3
    p = p * f + _L4
    p = p * f + _L5
    p = p * f + _L6
    p = p * f + _L7
    p = p * f + _L8
    square = f * f
    curve = 0.5 * square - f * square * p
    return ((k * _LN2_LOW + curve) - f) + k * _LN2_HIGH


@triton.jit
def _cos_sin_turn(u):
    quarters = 4.0 * u
    shifted = quarters + _ROUND_MAGIC
    quadrant = shifted.to(tl.int32, bitcast=True) & 3
    d = quarters - (shifted - _ROUND_MAGIC)
    x = d * d
    cosine = 1.0 - x * (((x * _C0 + _C1) * x + _C2) * x + _C3)
    sine = 2.0 * d - d * (((x * _S0 + _S1) * x + _S2) * x + _S3)
    odd = (quadrant & 1) == 1
    # Times minus one, not a minus sign: triton's is 0 - x, which makes +0 of a zero where -0 is due.
    cosine_sign = (1 - ((quadrant + 1) & 2)).to(tl.float32)
    sine_sign = (1 - (quadrant & 2)).to(tl.float32)
    return tl.where(odd, sine, cosine) * cosine_sign, tl.where(odd, cosine, sine) * sine_sign


@triton.jit
def _hash_kernel(seeds_B, out_BN, n, BLOCK: tl.constexpr):
    row = tl.program_id(1)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seeds_B + row).to(tl.uint32, bitcast=True)
    h = _hash(seed, index)
    tl.store(out_BN + row.to(tl.int64) * n + index, h.to(tl.int32, bitcast=True), mask=index < n)


@triton.jit
def _normal_kernel(seeds_BS, out_BN, n, length, sub_seeds, BLOCK: tl.constexpr):
    """One block of pairs of one sub-seed of one stream; the grid is (blocks, B * S)."""
    stream = tl.program_id(1).to(tl.int64)
    start = (stream % sub_seeds) * length
    count = tl.minimum(length, n - start)  # zero or less: nothing is left for this sub-seed
    pairs = (count + 1) // 2
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seeds_BS + stream).to(tl.uint32, bitcast=True)
    u1 = _hash(seed, index).to(tl.float32) * 2.3283064365386963e-10  # 2**-32
    u2 = _hash(seed, index + pairs).to(tl.float32) * 2.3283064365386963e-10
    radius = tl.sqrt_rn(2.0 * _negative_log(tl.maximum(u1, _MIN_U1)))
    cosine, sine = _cos_sin_turn(u2)
    out = out_BN + (stream // sub_seeds) * n + start
    kind = out_BN.dtype.element_ty
    tl.store(out + index, (radius * cosine).to(kind), mask=index < pairs)
    tl.store(out + pairs + index, (radius * sine).to(kind), mask=index + pairs < count)


class TritonBackend(TorchBackend):
    """Fused kernels for hashes and normals; the rest is torch's, built on those hashes."""

    name = "triton"

    def _normals(self, seeds_BS: npt.NDArray[np.uint32], n: int, dtype: str) -> torch.Tensor:
        rows, sub_seeds = seeds_BS.shape
        out_BN = torch.empty((rows, n), dtype=_TORCH_DTYPES[dtype], device=self.device)
        if out_BN.numel():
            length = definition.segment_length(n, sub_seeds)
            seeds = _signed(seeds_BS, self.device)
            for start in range(0, rows, self._rows_of_a_grid(sub_seeds)):
                part = slice(start, start + self._rows_of_a_grid(sub_seeds))
                grid = (triton.cdiv(-(-length // 2), _BLOCK), len(out_BN[part]) * sub_seeds)
                self._launch(_normal_kernel, grid, seeds[part], out_BN[part], n, length, sub_seeds)
        return out_BN

    def _signed_hashes(self, seeds_B: npt.NDArray[np.uint32], n: int) -> torch.Tensor:
        out_BN = torch.empty((len(seeds_B), n), dtype=torch.int32, device=self.device)
        if out_BN.numel():
            seeds = _signed(seeds_B, self.device)
            for start in range(0, len(seeds_B), self._rows_of_a_grid(1)):
                part = slice(start, start + self._rows_of_a_grid(1))
                grid = (triton.cdiv(n, _BLOCK), len(out_BN[part]))
                self._launch(_hash_kernel, grid, seeds[part], out_BN[part], n)
        return out_BN

    def _rows_of_a_grid(self, sub_seeds: int) -> int:
        return max(1, 65_535 // sub_seeds)  # CUDA's limit of the grid's second axis

    def _launch(self, kernel: triton.JITFunction, grid: tuple[int, int], *arguments: object) -> None:
        with torch.cuda.device(self.device):
            kernel[grid](*arguments, BLOCK=_BLOCK, num_warps=_WARPS, enable_fp_fusion=False)


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
