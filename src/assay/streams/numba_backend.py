"""The compiled CPU backend: the formulas of :mod:`assay.streams.definition`, element by element, vectorised by LLVM.

Kernels run without the GIL and are spread over a few Python threads. That is instead of numba's own parallel loops
because those abort the process when two threads meet in them (layer ``workqueue``) or after a fork (layer ``omp``), and
take ten times longer to compile. ``fastmath`` stays off, so LLVM neither fuses nor reorders.

Shapes: ``B`` streams of a batch, ``N`` elements of each, ``S`` sub-seeds of a stream.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import numpy.typing as npt

from assay.streams import definition
from assay.streams.backends import DTYPES, Array, Backend, as_tensor, numpy_dtype, tiles
from assay.streams.definition import UInts

if TYPE_CHECKING:
    import torch


_TILE = 1 << 17
"""Cells of one task: large against the cost of handing it to a thread, small enough to share out evenly."""

_NOISE_TILE = 1 << 18
"""Cells of one task of adding noise: one row of most vocabularies, for which threads cost what they save."""

_FLOAT32, _FLOAT16, _BFLOAT16 = range(len(DTYPES))

# The format is frozen, so are these: a kernel on disk keeps the values it was compiled with.
_LN, _SIN, _COS = definition.LN_POLY, definition.SIN_POLY, definition.COS_POLY
_LN2_HIGH, _LN2_LOW = definition.LN2_HIGH, definition.LN2_LOW
_MIN_U1, _SQRT_HALF_BITS = definition.MIN_U1, definition.SQRT_HALF_BITS
_ROUND_MAGIC, _SIGN_THRESHOLD = definition.ROUND_MAGIC, definition.SIGN_THRESHOLD
_LOG1P_SPLIT, _MIDDLE = definition.LOG1P_SPLIT, definition.MIDDLE
_ZERO, _HALF, _ONE, _TWO, _FOUR = (np.float32(x) for x in (0, 0.5, 1, 2, 4))
_SCALE, _HALF_SCALE = np.float32(2.0**-32), np.float32(2.0**-33)


def _compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Compile on first use, keeping the result on disk where there is a place to keep it."""
    try:
        kernel = numba.njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache folder can be written
        return numba.njit(nogil=True, **options)(function)
    kernel._cache.save_overload = _forgiving(kernel._cache.save_overload)
    return kernel


def _forgiving(save: Callable[..., None]) -> Callable[..., None]:
    """Save as before, but let a full disk cost the next process the time to compile, and nothing else."""

    def attempt(*args: Any) -> None:
        with suppress(OSError):
            save(*args)

    return attempt


_inline = partial(_compiled, forceinline=True)


@_inline
def _rotate_left(x: Any, bits: int) -> Any:
    return np.uint32(np.uint32(x << np.uint32(bits)) | np.uint32(x >> np.uint32(32 - bits)))


@_inline
def _hash(seed: Any, index: int) -> Any:
    k = np.uint32(np.uint32(index) * np.uint32(0xCC9E2D51))
    k = _rotate_left(k, 15)
    k = np.uint32(k * np.uint32(0x1B873593))
    h = np.uint32(seed ^ k)
    h = _rotate_left(h, 13)
    h = np.uint32(np.uint32(h * np.uint32(5)) + np.uint32(0xE6546B64))
    h = np.uint32(h ^ np.uint32(h >> np.uint32(16)))
    h = np.uint32(h * np.uint32(0x85EBCA6B))
    h = np.uint32(h ^ np.uint32(h >> np.uint32(13)))
    h = np.uint32(h * np.uint32(0xC2B2AE35))
    return np.uint32(h ^ np.uint32(h >> np.uint32(16)))


@_inline
def _uniform(seed: Any, index: int) -> Any:
    return np.float32(_hash(seed, index)) * _SCALE


@_inline
def _split(u: Any) -> Any:
    """The k and f of ``u = 2**-k (1 + f)``."""
    bits = np.float32(u).view(np.int32)
    exponent = np.int32(np.int32(bits - _SQRT_HALF_BITS) >> np.int32(23))
    k = np.float32(np.int32(-exponent))
    f = np.int32(bits - np.int32(exponent << np.int32(23))).view(np.float32) - _ONE
    return k, f


@_inline
def _negative_log_of_parts(k: Any, f: Any) -> Any:
    square = f * f
    p = _LN[0] * f + _LN[1]
    p = p * f + _LN[2]
    p = p * f + _LN[3]
    p = p * f + _LN[4]
    p = p * f + _LN[5]
    p = p * f + _LN[6]
    p = p * f + _LN[7]
    p = p * f + _LN[8]
    curve = _HALF * square - f * square * p
    return ((k * _LN2_LOW + curve) - f) + k * _LN2_HIGH


@_inline
def _negative_log(u: Any) -> Any:
    k, f = _split(u)
    return _negative_log_of_parts(k, f)


@_inline
def _gumbel(seed: Any, index: int) -> Any:
    h = _hash(seed, index)
    small = np.uint32(min(h, np.uint32(~h)))
    x = np.float32(np.uint32(np.uint32(small << np.uint32(1)) | np.uint32(1))) * _HALF_SCALE
    # Both logarithms of the definition are one: what differs is where k and f come from.
    k, f = _split(x)
    halved = x > _LOG1P_SPLIT
    upper_k = _ONE if halved else _ZERO
    upper_f = _ONE - _TWO * x if halved else -x
    is_upper = h < _MIDDLE
    return _negative_log(_negative_log_of_parts(upper_k if is_upper else k, upper_f if is_upper else f))


@_inline
def _normal_pair(seed: Any, index: int, pairs: int) -> Any:
    """Box-Muller of element ``index`` and of its partner ``pairs`` further on."""
    u1, u2 = _uniform(seed, index), _uniform(seed, index + pairs)
    radius = np.float32(math.sqrt(_TWO * _negative_log(max(u1, _MIN_U1))))
    quarters = _FOUR * u2
    shifted = np.float32(quarters + _ROUND_MAGIC)
    quadrant = np.int32(np.float32(shifted).view(np.int32) & np.int32(3))
    d = quarters - (shifted - _ROUND_MAGIC)
    x = d * d
    cosine = _ONE - x * (((_COS[0] * x + _COS[1]) * x + _COS[2]) * x + _COS[3])
    sine = _TWO * d - d * (((_SIN[0] * x + _SIN[1]) * x + _SIN[2]) * x + _SIN[3])
    odd = (quadrant & np.int32(1)) == np.int32(1)
    turned_cosine = sine if odd else cosine
    turned_sine = cosine if odd else sine
    cosine = -turned_cosine if ((quadrant + np.int32(1)) & np.int32(2)) == np.int32(2) else turned_cosine
    sine = -turned_sine if (quadrant & np.int32(2)) == np.int32(2) else turned_sine
    return radius * cosine, radius * sine


@_inline
def _encoded(z: Any, kind: int) -> Any:
    """The bits of ``z`` in one of the formats, rounded to nearest even; ``|z| < 7``, so nothing overflows."""
    bits = np.float32(z).view(np.uint32)
    if kind == _FLOAT32:
        return bits
    if kind == _BFLOAT16:
        odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        return np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    sign = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000))
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    # A float16 subnormal counts steps of 2**-24. Above 0.5 a float32 has just that step, so the addition rounds to it.
    count = np.uint32(np.float32(np.uint32(magnitude).view(np.float32) + _HALF).view(np.uint32) - np.uint32(0x3F000000))
    odd = np.uint32(np.uint32(magnitude >> np.uint32(13)) & np.uint32(1))
    rounded = np.uint32(np.uint32(magnitude - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13))
    return np.uint32(sign | (count if magnitude < np.uint32(0x38800000) else rounded))


# Loops over slices from zero: LLVM then sees that no index is negative and vectorises them.


@_inline
def _fill_pairs(seed: Any, first: int, pairs: int, kind: int, cosines: Any, sines: Any) -> None:
    for i in range(len(sines)):
        z_cos, z_sin = _normal_pair(seed, first + i, pairs)
        cosines[i] = _encoded(z_cos, kind)
        sines[i] = _encoded(z_sin, kind)
    if len(sines) < len(cosines):  # an odd length: the last cosine has no sine
        last = len(sines)
        cosines[last] = _encoded(_normal_pair(seed, first + last, pairs)[0], kind)


@_compiled
def _fill_normals(
    seeds_BS: Any, out_BN: Any, length: int, kind: int, row: int, row_stop: int, pair: int, pair_stop: int
) -> None:
    """Pairs ``pair`` to ``pair_stop`` of every sub-seed's segment of rows ``row`` to ``row_stop``, as bits."""
    for b in range(row, row_stop):
        for s in range(seeds_BS.shape[1]):
            segment = out_BN[b][s * length : (s + 1) * length]
            pairs = (len(segment) + 1) // 2
            cosines, sines = segment[:pairs], segment[pairs:]
            _fill_pairs(seeds_BS[b, s], pair, pairs, kind, cosines[pair:pair_stop], sines[pair:pair_stop])


@_compiled
def _fill_hashes(seeds_B: Any, out_BN: Any, row: int, row_stop: int, column: int, column_stop: int) -> None:
    for b in range(row, row_stop):
        seed, out = seeds_B[b], out_BN[b][column:column_stop]
        for i in range(len(out)):
            out[i] = _hash(seed, column + i)


@_compiled
def _fill_uniforms(seeds_B: Any, out_BN: Any, row: int, row_stop: int, column: int, column_stop: int) -> None:
    for b in range(row, row_stop):
        seed, out = seeds_B[b], out_BN[b][column:column_stop]
        for i in range(len(out)):
            out[i] = _uniform(seed, column + i)


@_compiled
def _fill_signs(seeds_B: Any, out_BN: Any, row: int, row_stop: int, column: int, column_stop: int) -> None:
    for b in range(row, row_stop):
        seed, out = seeds_B[b], out_BN[b][column:column_stop]
        for i in range(len(out)):
            out[i] = np.int8(1) if _hash(seed, column + i) >= _SIGN_THRESHOLD else np.int8(-1)


# An index of 32 bits stays in lanes as wide as those of the floats: 1.6 times as fast here, where most of the work is
# on floats (benchmarks/gumbel.py). No tile is longer.


@_compiled
def _fill_gumbels(seeds_B: Any, out_BN: Any, row: int, row_stop: int, column: int, column_stop: int) -> None:
    start = np.uint32(column)
    for b in range(row, row_stop):
        seed, out = seeds_B[b], out_BN[b][column:column_stop]
        for i in range(np.int32(len(out))):
            out[i] = _gumbel(seed, np.uint32(start + np.uint32(i)))


@_compiled
def _add_gumbels(
    seeds_N: Any, starts_N: Any, scores: Any, row: int, row_stop: int, column: int, column_stop: int
) -> None:
    """Add to the rows that begin at ``starts_N`` of the flat ``scores``."""
    start = np.uint32(column)
    for b in range(row, row_stop):
        seed, out = seeds_N[b], scores[starts_N[b] + column : starts_N[b] + column_stop]
        for i in range(np.int32(len(out))):
            out[i] += _gumbel(seed, np.uint32(start + np.uint32(i)))


@_compiled
def _fill_row_seeds(words_N8: Any, steps_N: Any, out_N: Any) -> None:
    for n in range(len(steps_N)):
        seed = steps_N[n]
        for word in words_N8[n]:
            seed = _hash(word, seed)
        out_N[n] = seed


class NumbaBackend(Backend):
    """Compiled for this CPU on first use (a few seconds, once) and run on all its cores."""

    name = "numba"

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self._threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def _hashes(self, seeds_B: UInts, n: int) -> npt.NDArray[Any]:
        return self._filled(_fill_hashes, seeds_B, n, np.uint32)

    def _uniforms(self, seeds_B: UInts, n: int) -> Array:
        return self._filled(_fill_uniforms, seeds_B, n, np.float32)

    def _signs(self, seeds_B: UInts, n: int) -> Array:
        return self._filled(_fill_signs, seeds_B, n, np.int8)

    def _permutations(self, seeds_B: UInts, n: int) -> Array:
        return self._picks(seeds_B, n, n)

    def _picks(self, seeds_B: UInts, n: int, k: int) -> Array:
        # Hash above index in one integer: sorting these is the stable argsort of the hashes, and much faster.
        keys_BN = self._hashes(seeds_B, n).astype(np.uint64)
        keys_BN <<= np.uint64(32)
        keys_BN |= np.arange(n, dtype=np.uint64)
        if k < n:
            keys_BN = np.partition(keys_BN, k, axis=1)[:, :k]
        keys_BN.sort(axis=1)
        return (keys_BN & np.uint64(0xFFFFFFFF)).astype(np.int64)

    def _normals(self, seeds_BS: UInts, n: int, dtype: str) -> Array:
        out_BN = np.empty((len(seeds_BS), n), np.uint32 if dtype == "float32" else np.uint16)
        length = definition.segment_length(n, seeds_BS.shape[1])
        # A tile covers its pairs in the segments of all sub-seeds.
        work = tiles(len(seeds_BS), -(-length // 2), max(1, _TILE // (2 * seeds_BS.shape[1])))
        self._spread(partial(_fill_normals, seeds_BS, out_BN, length, DTYPES.index(dtype)), work)
        return out_BN.view(numpy_dtype(dtype))

    def _gumbels(self, seeds_B: UInts, n: int) -> Array:
        return self._filled(_fill_gumbels, seeds_B, n, np.float32)

    def _add_gumbels(self, scores_RV: torch.Tensor, seeds_N: torch.Tensor, rows_N: torch.Tensor | None) -> None:
        rows, columns = scores_RV.shape
        stride = scores_RV.stride(0)
        # One axis, so that a row of a wider array (logits of a padded vocabulary) is contiguous to the compiler.
        flat = scores_RV.as_strided(((rows - 1) * stride + columns,), (1,)).numpy()
        starts_N = (np.arange(rows) if rows_N is None else rows_N.numpy()) * stride
        add = partial(_add_gumbels, seeds_N.numpy().view(np.uint32), starts_N, flat)
        self._spread(add, tiles(len(starts_N), columns, _NOISE_TILE))

    def _row_seeds(self, words_N8: torch.Tensor, steps_N: torch.Tensor) -> torch.Tensor:
        seeds_N = np.empty(len(steps_N), np.uint32)
        _fill_row_seeds(words_N8.numpy().view(np.uint32), steps_N.numpy().view(np.uint32), seeds_N)
        return as_tensor(seeds_N.view(np.int32))

    def _filled(self, kernel: Any, seeds_B: UInts, n: int, dtype: Any) -> npt.NDArray[Any]:
        out_BN = np.empty((len(seeds_B), n), dtype)
        self._spread(partial(kernel, seeds_B, out_BN), tiles(len(seeds_B), n, _TILE))
        return out_BN

    def _spread(self, fill: Callable[..., None], work: list[tuple[int, int, int, int]]) -> None:
        # The pool lives as long as the call: nothing is left behind that a fork could break.
        if len(work) <= 1 or self._threads == 1:
            for tile in work:
                fill(*tile)
            return
        with ThreadPoolExecutor(min(self._threads, len(work))) as pool:
            for done in [pool.submit(fill, *tile) for tile in work]:
                done.result()
