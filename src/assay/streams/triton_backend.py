"""The triton backend: fused kernels on CUDA, one pass over memory for a whole batch.

Every call is queued on torch's current stream and returns without waiting for the device. A kernel
has hash, uniforms, logarithm, sine and root of a pair in registers, and writes to memory once. The
bits are those of :mod:`assay.streams.definition`. Four rewritings, all exact, save instructions:

- **Powers of two are folded into constants.** Uniforms stay in units of 2**-32, the logarithm is
  half of itself, cosine and sine twice themselves. Scaling by a power of two commutes with every
  rounding, as nothing is subnormal.
- **The hash is cut at the seed.** ``rotl(s ^ k, 13) = rotl(s, 13) ^ rotl(k, 13)``: all before that
  depends on the index alone and is kept in registers over the rows of a program.
- **Signs move to the radius.** A product is the same whichever factor has the sign, zeros included.
- **The root has no branch** (``_root``).

The kernels must be launched with ``enable_fp_fusion=False``. By default the compiler contracts a
multiply and an add into one operation that rounds once.

Shapes: ``B`` streams of a batch, ``N`` elements of each, ``S`` sub-seeds of a stream, ``D``
    coordinates, ``R``
reflections. Where noise is added: ``N`` rows that get it, ``R`` rows of scores, ``V`` columns,
``W`` words.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from assay.errors import BackendUnavailable
from assay.streams import definition
from assay.streams.backends import WORDS, torch_dtype
from assay.streams.definition import UInts
from assay.streams.torch_backend import DTYPES_OF_KINDS, TorchBackend, on_device

# Kernels are written in triton's language, which has no annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: ANN001, ANN201, ANN202


# Uniforms are in units of 2**-32, their doubles of Gumbel numbers in units of 2**-33.
_MIN_U1 = tl.constexpr(float(definition.MIN_U1) * 2.0**32)
_LOG1P_SPLIT = tl.constexpr(float(definition.LOG1P_SPLIT) * 2.0**33)
_SQRT_HALF_BITS = tl.constexpr(int(definition.SQRT_HALF_BITS))
# Half the logarithm as a function of f / 2; k comes negative and in units of 2**23, where exponents
# stand.
_LN2_HIGH, _LN2_LOW = (
    tl.constexpr(float(c) * 2.0**-24) for c in (definition.LN2_HIGH, definition.LN2_LOW)
)
_LN = tl.constexpr(tuple(float(c) * 2.0 ** (10 - i) for i, c in enumerate(definition.LN_POLY)))
# Twice the cosine and the sine, as functions of 4 d and 16 x.
_ROUND_MAGIC = tl.constexpr(float(definition.ROUND_MAGIC) * 4.0)
_COS = tl.constexpr(
    tuple(float(c) * 2.0 ** (4 * i - 15) for i, c in enumerate(definition.COS_POLY))
)
_SIN = tl.constexpr(
    tuple(float(c) * 2.0 ** (4 * i - 13) for i, c in enumerate(definition.SIN_POLY))
)

_SIGN_THRESHOLD = tl.constexpr(int(definition.SIGN_THRESHOLD))


@triton.jit
def _rotated_seed(seed):
    seed = seed.to(tl.uint32, bitcast=True)
    return (seed << 13) | (seed >> 19)


@triton.jit
def _index_part(index):
    k = index * 0xCC9E2D51
    k = (k << 15) | (k >> 17)
    k = k * 0x1B873593
    return (k << 13) | (k >> 19)


@triton.jit
def _hash(rotated_seed, index):
    h = rotated_seed ^ _index_part(index)
    h = h * 5 + 0xE6546B64
    h = h ^ (h >> 16)
    h = h * 0x85EBCA6B
    h = h ^ (h >> 13)
    h = h * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _root(x):
    """The correctly rounded square root of 0 and of the values from 2**-30 to 16, which hold all
    that occur.

    It is what ``sqrt.rn.f32`` becomes in the machine, an estimate and one step of Newton with a
    fused residual, less the test for values out of range: that is a branch for every pair, and
    stands between the instructions of neighbours. 2**-100 (0f0D800000) is lost in the sum with any
    value but 0, whose estimate it keeps finite. A test compares every float32 of the range.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 y, g, h, r;
        add.rn.f32 y, $1, 0f0D800000;
        rsqrt.approx.ftz.f32 y, y;
        mul.rn.f32 g, $1, y;
        mul.rn.f32 h, y, 0f3F000000;
        neg.f32 r, g;
        fma.rn.f32 r, r, g, $1;
        fma.rn.f32 $0, r, h, g;
        }""",
        "=f,f",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _polynomial(x, coefficients: tl.constexpr):
    value = x * coefficients[0] + coefficients[1]
    for i in tl.static_range(2, len(coefficients)):
        value = value * x + coefficients[i]
    return value


@triton.jit
def _split(u, unit: tl.constexpr):
    """Half the f, and minus k in units of 2**23, of ``u / 2**unit = 2**-k (1 + f)``."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - (_SQRT_HALF_BITS + (unit << 23))) & (-1 << 23)
    return (bits - exponent - ((unit + 1) << 23)).to(tl.float32, bitcast=True) - 0.5, exponent.to(
        tl.float32
    )


@triton.jit
def _half_negative_log_of_parts(f, minus_k):
    square = f * f
    curve = square - f * square * _polynomial(f, _LN)
    return ((curve - minus_k * _LN2_LOW) - f) - minus_k * _LN2_HIGH


@triton.jit
def _half_negative_log(u, unit: tl.constexpr):
    """``-ln(u / 2**unit) / 2``."""
    f, minus_k = _split(u, unit)
    return _half_negative_log_of_parts(f, minus_k)


@triton.jit
def _gumbel(h):
    """The Gumbel number of a hash. Both logarithms of the definition are one, of an f and k chosen
    before.
    """
    x = (tl.minimum(h, ~h) * 2 + 1).to(tl.float32)  # in units of 2**-33
    f, minus_k = _split(x, 33)
    halved = x > _LOG1P_SPLIT
    scaled = x * -(2.0**-33)
    upper_f = tl.where(halved, 0.5 + scaled, 0.5 * scaled)
    upper_minus_k = tl.where(halved, -(2.0**23), 0.0)
    is_upper = h.to(tl.int32, bitcast=True) >= 0
    half = _half_negative_log_of_parts(
        tl.where(is_upper, upper_f, f), tl.where(is_upper, upper_minus_k, minus_k)
    )
    return 2.0 * _half_negative_log(half, -1)  # E is twice its half


@triton.jit
def _box_muller(h1, h2):
    """Two normals from two hashes."""
    radius = _root(_half_negative_log(tl.maximum(h1.to(tl.float32), _MIN_U1), 32))
    quarters = h2.to(tl.float32) * 2.0**-28
    shifted = quarters + _ROUND_MAGIC
    d = quarters - (shifted - _ROUND_MAGIC)
    x = d * d
    cosine = 2.0 - x * _polynomial(x, _COS)
    sine = d - d * _polynomial(x, _SIN)
    quadrant = shifted.to(tl.int32, bitcast=True)  # its two lowest bits
    odd = (quadrant & 1) != 0
    radius = (radius.to(tl.int32, bitcast=True) ^ ((quadrant << 30) & (-1 << 31))).to(
        tl.float32, bitcast=True
    )
    # Times minus one, not a minus sign: triton's is 0 - x, which makes +0 of a zero where -0 is
    # due.
    return radius * tl.where(odd, sine * -1.0, cosine), radius * tl.where(odd, cosine, sine)


@triton.jit
def _one(rotated_seed, index, pairs, kind: tl.constexpr):
    cosine, sine = _box_muller(_hash(rotated_seed, index), _hash(rotated_seed, index + pairs))
    return cosine.to(kind), sine.to(kind)


@triton.jit
def _two(rotated_seed, index, pairs, kind: tl.constexpr):
    c0, s0 = _one(rotated_seed, index, pairs, kind)
    c1, s1 = _one(rotated_seed, index + 4, pairs, kind)
    return tl.join(c0, c1), tl.join(s0, s1)


@triton.jit
def _four(rotated_seed, index, pairs, kind: tl.constexpr):
    c0, s0 = _two(rotated_seed, index, pairs, kind)
    c1, s1 = _two(rotated_seed, index + 2, pairs, kind)
    return tl.join(c0, c1), tl.join(s0, s1)


@triton.jit
def _eight(rotated_seed, index, pairs, kind: tl.constexpr):
    """Normals of 8 pairs from every index on. A join is a new last axis, so that the last one joins
    neighbours.
    """
    c0, s0 = _four(rotated_seed, index, pairs, kind)
    c1, s1 = _four(rotated_seed, index + 1, pairs, kind)
    return tl.reshape(tl.join(c0, c1), [c0.numel * 2]), tl.reshape(tl.join(s0, s1), [c0.numel * 2])


@triton.jit(
    do_not_specialize=["rows", "together", "sub_seeds", "n", "length", "pairs", "sines"],
    do_not_specialize_on_alignment=["seeds_BS"],
)
def normal_kernel(
    seeds_BS,
    out_BN,
    rows,
    together,
    sub_seeds,
    n,
    length,
    pairs,
    sines,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normals of sub-seeds that are ``length`` apart: ``pairs`` cosines each, then ``sines`` sines.

    All four lengths are in units of UNIT elements: with 16, stores are wide. The grid is (blocks of
    pairs, groups of rows, sub-seeds); a program makes one block of ``together`` rows.
    """
    sub_seed = tl.program_id(2)
    first = tl.program_id(1).to(tl.int64) * together
    start = tl.program_id(0).to(tl.int64) * BLOCK
    pairs = pairs.to(tl.int64) * UNIT
    place = tl.arange(0, BLOCK)
    has_cosine = place < pairs - start
    has_sine = place < sines.to(tl.int64) * UNIT - start
    index = start.to(tl.uint32) + 8 * tl.arange(0, BLOCK // 8).to(tl.uint32)
    row_length = n.to(tl.int64) * UNIT
    out_BN += sub_seed * length.to(tl.int64) * UNIT + start
    for row in range(first, tl.minimum(first + together, rows)):
        rotated_seed = _rotated_seed(tl.load(seeds_BS + row * sub_seeds + sub_seed))
        cosines, sines_ = _eight(rotated_seed, index, pairs.to(tl.uint32), out_BN.dtype.element_ty)
        out = out_BN + row * row_length + place
        tl.store(out, cosines, mask=has_cosine)
        tl.store(out + pairs, sines_, mask=has_sine)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["seeds_B", "out_BN"])
def hash_kernel(seeds_B, out_BN, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """What follows from one hash: the hash itself, its order among int32, its sign, its uniform, or
    Gumbel number.
    """
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = _hash(_rotated_seed(tl.load(seeds_B + row)), place.to(tl.uint32))
    if KIND == "order":
        values = h.to(tl.int32, bitcast=True) ^ (-1 << 31)
    elif KIND == "signs":
        values = tl.where(h >= _SIGN_THRESHOLD, 1, -1)
    elif KIND == "uniforms":
        values = h.to(tl.float32) * 2.3283064365386963e-10  # 2**-32
    elif KIND == "gumbels":
        values = _gumbel(h)
    else:
        values = h.to(tl.int32, bitcast=True)
    tl.store(out_BN + row * n + place, values.to(out_BN.dtype.element_ty), mask=place < n)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["seeds_N", "rows_N"])
def add_gumbels_kernel(
    seeds_N, rows_N, scores_RV, rows, columns, stride, HAS_ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Add Gumbel numbers to rows of scores that are ``stride`` apart; a program does BLOCK columns
    of one row.
    """
    blocks = tl.cdiv(columns, BLOCK)
    n = tl.program_id(0) // blocks
    row = n.to(tl.int64)
    if HAS_ROWS:
        row = tl.load(rows_N + n)
    place = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    gumbels = _gumbel(_hash(_rotated_seed(tl.load(seeds_N + n)), place.to(tl.uint32)))
    scores = scores_RV + row * stride + place
    if (row >= 0) & (
        row < rows
    ):  # rows are not checked before: one that is not there must not write elsewhere
        tl.store(scores, tl.load(scores, mask=place < columns) + gumbels, mask=place < columns)


@triton.jit(
    do_not_specialize=["rows"], do_not_specialize_on_alignment=["words_NW", "steps_N", "seeds_N"]
)
def row_seeds_kernel(words_NW, steps_N, seeds_N, rows, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """The seed of one step for each of BLOCK rows: the step hashed with one word after the
    other.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(steps_N + row, mask=row < rows, other=0).to(tl.uint32)
    for word in tl.static_range(WORDS):
        seed = _hash(
            _rotated_seed(tl.load(words_NW + row * WORDS + word, mask=row < rows, other=0)), seed
        )
    tl.store(seeds_N + row, seed.to(tl.int32, bitcast=True), mask=row < rows)


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit(
    do_not_specialize=["d", "reflections"],
    do_not_specialize_on_alignment=["seeds_BR", "x_BD", "out_BD"],
)
def reflect_kernel(seeds_BR, x_BD, out_BD, d, reflections, BLOCK: tl.constexpr):
    """Reflections ``x - 2 (x v) / (v v) v``, one for every seed of a row; a program has one row and
    BLOCK pairs.

    Where an element is in the sums of v v and x v depends on D alone, so a row does not depend on
    its batch.
    """
    row = tl.program_id(0).to(tl.int64)
    pairs = (d + 1) // 2
    place = tl.arange(0, BLOCK)
    is_low = place < pairs
    is_high = place < d - pairs
    low = x_BD + row * d + place
    high = x_BD + row * d + pairs + place
    x_low = tl.load(low, mask=is_low, other=0.0)
    x_high = tl.load(high, mask=is_high, other=0.0)
    index = place.to(tl.uint32)
    for r in range(reflections):
        rotated_seed = _rotated_seed(tl.load(seeds_BR + row * reflections + r))
        v_low, v_high = _one(rotated_seed, index, pairs.to(tl.uint32), tl.float32)
        v_low = tl.where(is_low, v_low, 0.0)
        v_high = tl.where(is_high, v_high, 0.0)
        square, product = tl.reduce(
            (v_low * v_low + v_high * v_high, x_low * v_low + x_high * v_high), 0, _add_both
        )
        factor = tl.div_rn(2.0 * product, square)
        x_low -= factor * v_low
        x_high -= factor * v_high
    tl.store(out_BD + row * d + place, x_low, mask=is_low)
    tl.store(out_BD + row * d + pairs + place, x_high, mask=is_high)


BLOCK = 4096
WARPS = 16
"""Pairs of a program, and its warps."""

TOGETHER = 8
PROGRAMS = 128
"""A program keeps what the index gives to the hash over 8 rows, over fewer where that leaves less
than 128 programs.
"""

_GRID = 65_535
"""CUDA's limit of the second and third axis of a grid."""

_MAX_REFLECTED = 16_384
"""Coordinates of a row that one program can hold in its registers."""

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
        self._launch(reflect_kernel, (rows,), *arguments, BLOCK=block, num_warps=warps)
        return out_BD

    def _add_gumbels(
        self, scores_RV: torch.Tensor, seeds_N: torch.Tensor, rows_N: torch.Tensor | None
    ) -> None:
        rows, columns = scores_RV.shape
        grid = (len(seeds_N) * -(-columns // _HASH_BLOCK),)
        numbers = seeds_N if rows_N is None else rows_N
        arguments = (seeds_N, numbers, scores_RV, rows, columns, scores_RV.stride(0))
        self._launch(
            add_gumbels_kernel, grid, *arguments, HAS_ROWS=rows_N is not None, BLOCK=_HASH_BLOCK
        )

    def _row_seeds(self, words_N8: torch.Tensor, steps_N: torch.Tensor) -> torch.Tensor:
        seeds_N = torch.empty(len(steps_N), dtype=torch.int32, device=steps_N.device)
        if len(steps_N):
            grid = (-(-len(steps_N) // _SEED_BLOCK),)
            arguments = (words_N8, steps_N, seeds_N, len(steps_N))
            self._launch(row_seeds_kernel, grid, *arguments, WORDS=WORDS, BLOCK=_SEED_BLOCK)
        return seeds_N

    def _from_hashes(self, kind: str, seeds_B: UInts, n: int) -> torch.Tensor:
        out_BN = torch.empty(
            (len(seeds_B), n), dtype=DTYPES_OF_KINDS.get(kind, torch.int32), device=self.device
        )
        if out_BN.numel():
            for seeds, out in _grids(on_device(seeds_B, self.device), out_BN, _GRID):
                grid = (-(-n // _HASH_BLOCK), len(out))
                self._launch(hash_kernel, grid, seeds, out, n, KIND=kind, BLOCK=_HASH_BLOCK)
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

    def _fill(
        self, seeds_BS: torch.Tensor, out_BN: torch.Tensor, length: int, count: int, sub_seeds: int
    ) -> None:
        """Make ``count`` normals of the first ``sub_seeds`` sub-seeds of every row, ``length``
        apart.
        """
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
                normal_kernel,
                (blocks, -(-rows // together), sub_seeds),
                *(
                    seeds,
                    out,
                    rows,
                    together,
                    seeds.stride(0),
                    *(value // unit for value in lengths),
                ),
                UNIT=unit,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )

    def _launch(
        self,
        kernel: triton.JITFunction,
        grid: tuple[int, ...],
        *arguments: object,
        **options: object,
    ) -> Any:
        """Queue a kernel, and return what was compiled for these arguments."""
        with torch.cuda.device(self.device) if self._numbered else nullcontext():
            return kernel[grid](*arguments, **options, enable_fp_fusion=False)


def _grids(
    seeds: torch.Tensor, out_BN: torch.Tensor, rows: int
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Cut a batch into pieces of so many rows, mostly one."""
    if len(out_BN) <= rows:
        return ((seeds, out_BN),)
    return zip(torch.split(seeds, rows), torch.split(out_BN, rows), strict=True)
