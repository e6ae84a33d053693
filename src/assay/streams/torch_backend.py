"""The torch backend, on CPU and CUDA: the formulas of the definition over whole tensors.

Three habits keep the bits the same everywhere. Every multiply and every add is an eager operation
of its own, so nothing is fused (``addcmul``, ``add(alpha=)`` and ``torch.compile`` do fuse, and are
not used). Unsigned 32-bit arithmetic is done in int32, which wraps and has the same low bits; only
the right shift needs a mask. And the square root is taken in float64, because ``torch.sqrt`` of
float32 is one ulp off on some CPUs.

Shapes: ``B`` streams of a batch, ``N`` elements of each, ``S`` sub-seeds of a stream.
"""

from __future__ import annotations

import numpy as np
import torch

from assay.devices import check_device
from assay.streams import definition
from assay.streams.arrays import torch_dtype
from assay.streams.backends import Backend
from assay.streams.definition import UInts

# Pairs computed at a time: temporaries stay in the cache of a CPU. On a GPU they take 400 MB, and
# more is not faster.
_TILE = {"cpu": 1 << 17, "cuda": 1 << 22}

DTYPES_OF_KINDS = {"uniforms": torch.float32, "signs": torch.int8, "gumbels": torch.float32}
"""Dtypes of the numbers of a kind; hashes and their order are int32 with the same bits."""


class TorchBackend(Backend):
    """Eager torch operations on one device."""

    name = "torch"

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self._tile = _TILE[torch.device(device).type]
        count = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
        check_device(device, count)

    def _generate(self, kind: str, seeds_B: UInts, n: int) -> torch.Tensor:
        if kind == "permutations":
            return torch.argsort(self._from_hashes("order", seeds_B, n), dim=1, stable=True)
        numbers_BN = self._from_hashes(kind, seeds_B, n)
        return numbers_BN.view(torch.uint32) if kind == "hashes" else numbers_BN

    def _picks(self, seeds_B: UInts, n: int, k: int) -> torch.Tensor:
        # The hashes of a stream never tie, so the k smallest in ascending order are unique.
        order_BN = self._from_hashes("order", seeds_B, n)
        return torch.topk(order_BN, k, dim=1, largest=False, sorted=True).indices

    def _add_gumbels(
        self, scores_RV: torch.Tensor, seeds_N: torch.Tensor, rows_N: torch.Tensor | None
    ) -> None:
        for row, row_stop, column, column_stop in tiles(
            len(seeds_N), scores_RV.shape[1], self._tile
        ):
            gumbels = _gumbel(_hash(seeds_N[row:row_stop], column, column_stop))
            if rows_N is None:
                scores_RV[row:row_stop, column:column_stop] += gumbels
            else:
                scores_RV[:, column:column_stop].index_add_(0, rows_N[row:row_stop], gumbels)

    def _row_seeds(self, words_N8: torch.Tensor, steps_N: torch.Tensor) -> torch.Tensor:
        seeds_N = steps_N
        for words_N in words_N8.unbind(1):
            seeds_N = _hash_of(words_N, seeds_N)
        return seeds_N

    def _from_hashes(self, kind: str, seeds_B: UInts, n: int) -> torch.Tensor:
        """Return the numbers of a kind of :func:`_from_hash`, ``[B, n]``."""
        out_BN = torch.empty(
            (len(seeds_B), n), dtype=DTYPES_OF_KINDS.get(kind, torch.int32), device=self.device
        )
        signed_B = on_device(seeds_B, self.device)
        for row, row_stop, column, column_stop in tiles(len(seeds_B), n, self._tile):
            hashes = _hash(signed_B[row:row_stop], column, column_stop)
            out_BN[row:row_stop, column:column_stop] = _from_hash(kind, hashes)
        return out_BN

    def _normals(self, seeds_BS: UInts, n: int, dtype: str) -> torch.Tensor:
        out_BN = torch.empty((len(seeds_BS), n), dtype=torch_dtype(dtype), device=self.device)
        length = definition.segment_length(n, seeds_BS.shape[1])
        for sub_seed, start in enumerate(range(0, n, length)):
            # The slice of the output ends at n: the last sub-seed makes the remainder.
            seeds_B = on_device(seeds_BS[:, sub_seed], self.device)
            self._fill_normals(seeds_B, out_BN[:, start : start + length])
        return out_BN

    def _fill_normals(self, seeds_B: torch.Tensor, out_BN: torch.Tensor) -> None:
        """Fill ``out_BN`` with one Box-Muller over its width, a tile of pairs at a time."""
        rows, n = out_BN.shape
        pairs = -(-n // 2)
        for row, row_stop, pair, pair_stop in tiles(rows, pairs, self._tile):
            seeds = seeds_B[row:row_stop]
            u1 = _uniform(_hash(seeds, pair, pair_stop))
            u2 = _uniform(_hash(seeds, pairs + pair, pairs + pair_stop))
            cosines, sines = _box_muller(u1, u2)
            out_BN[row:row_stop, pair:pair_stop] = cosines
            # An odd n: the last cosine has no sine.
            sines_stop = min(pairs + pair_stop, n)
            out_BN[row:row_stop, pairs + pair : sines_stop] = sines[:, : sines_stop - pairs - pair]


def tiles(rows: int, columns: int, size: int) -> list[tuple[int, int, int, int]]:
    """Cut a grid into tiles of about ``size`` cells: ``(row, row_stop, column, column_stop)``."""
    width = max(1, min(columns, size))
    height = max(1, size // width)
    return [
        (row, min(row + height, rows), column, min(column + width, columns))
        for row in range(0, rows, height)
        for column in range(0, columns, width)
    ]


def on_device(seeds: UInts, device: str) -> torch.Tensor:
    """Copy seeds to a device, as int32 with the same bits, without waiting for queued work.

    CUDA copies pageable memory before the call returns; pinned memory would have to be kept alive.
    """
    signed = torch.from_numpy(np.ascontiguousarray(seeds).view(np.int32))
    return signed.to(device, non_blocking=True)


def _int32(value: int) -> int:
    """Return the int32 with the bits of a uint32."""
    return value - (1 << 32) if value >= 1 << 31 else value


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _rotate_left(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x << bits).bitwise_or_(_shift_right(x, 32 - bits))


def _hash(seeds_B: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Return the hashes of elements ``start`` to ``stop`` of each stream, as int32."""
    indices = torch.arange(start, stop, device=seeds_B.device).to(torch.int32)
    return _hash_of(seeds_B[:, None], indices)


def _hash_of(seeds: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the hash of each index under each seed; all int32, and broadcast."""
    k = indices * _int32(0xCC9E2D51)
    k = _rotate_left(k, 15)
    k = k * 0x1B873593
    h = seeds ^ k
    h = _rotate_left(h, 13)
    h = h.mul_(5).add_(_int32(0xE6546B64))
    h ^= _shift_right(h, 16)
    h *= _int32(0x85EBCA6B)
    h ^= _shift_right(h, 13)
    h *= _int32(0xC2B2AE35)
    h ^= _shift_right(h, 16)
    return h


def _uniform(h: torch.Tensor) -> torch.Tensor:
    return h.view(torch.uint32).to(torch.float32).mul_(2.0**-32)


def _from_hash(kind: str, h: torch.Tensor) -> torch.Tensor:
    """Return the hash, its uniform, sign or Gumbel number, or the int32 of the same order."""
    match kind:
        case "gumbels":
            return _gumbel(h)
        case "uniforms":
            return _uniform(h)
        case "signs":
            # Flipping the top bit makes the signed order that of unsigned numbers.
            threshold = _int32(int(definition.SIGN_THRESHOLD) ^ 0x80000000)
            return (h ^ _int32(0x80000000) >= threshold).to(torch.int8) * 2 - 1
        case "order":
            return h ^ _int32(0x80000000)
        case _:
            return h


def _box_muller(u1: torch.Tensor, u2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    radius = _square_root(_negative_log(u1.clamp_(min=float(definition.MIN_U1))).mul_(2))
    cosine, sine = _cos_sin_turn(u2)
    return cosine.mul_(radius), sine.mul_(radius)


def _square_root(x: torch.Tensor) -> torch.Tensor:
    """Return the correctly rounded float32 root, even where the float64 root is an ulp off.

    Let m be a midpoint between two float32 values: an odd integer M of 25 bits, times 2**k. Then
    m**2 needs 49 bits or more, so x (24 bits) differs from it, by at least 2**(2k); and sqrt(x)
    differs from m by at least 2**(2k) / (sqrt(x) + m) > 2**(k - 26). A float64 near m has steps of
    2**(k - 28): sqrt(x) is four steps or more away from every point where rounding to float32 could
    turn. A square root that is a float32 value is likewise safe.
    """
    return x.to(torch.float64).sqrt_().to(torch.float32)


def _gumbel(h: torch.Tensor) -> torch.Tensor:
    """Return the Gumbel numbers of hashes.

    The definition takes one of two logarithms. Here k and f are selected first, and the logarithm
    is taken once.
    """
    # The smaller of h and ~h, as unsigned numbers.
    smaller = h ^ (h >> 31)
    x = smaller.to(torch.int64).mul_(2).add_(1).to(torch.float32).mul_(2.0**-33)
    k, f = _split(x)
    halved = x > float(definition.LOG1P_SPLIT)
    # Below the middle, as an unsigned number.
    is_upper = h >= 0
    k = torch.where(is_upper, halved.to(torch.float32), k)
    f = torch.where(is_upper, torch.where(halved, 1 - 2 * x, -x), f)
    return _negative_log(_negative_log_of_parts(k, f))


def _negative_log(u: torch.Tensor) -> torch.Tensor:
    return _negative_log_of_parts(*_split(u))


def _split(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k and f of ``u = 2**-k (1 + f)``."""
    bits = u.view(torch.int32)
    exponent = (bits - int(definition.SQRT_HALF_BITS)) >> 23
    return (-exponent).to(torch.float32), (bits - (exponent << 23)).view(torch.float32) - 1


def _negative_log_of_parts(k: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    square = f * f
    curve = (0.5 * square).sub_((f * square).mul_(_polynomial(definition.LN_POLY, f)))
    return (k * float(definition.LN2_LOW)).add_(curve).sub_(f).add_(k * float(definition.LN2_HIGH))


def _cos_sin_turn(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    magic = float(definition.ROUND_MAGIC)
    quarters = 4 * u
    shifted = quarters + magic
    quadrant = shifted.view(torch.int32) & 3
    d = quarters - (shifted - magic)
    x = d * d
    cosine = 1 - x * _polynomial(definition.COS_POLY, x)
    sine = (2 * d).sub_(d * _polynomial(definition.SIN_POLY, x))
    # Swap and negate by bits: torch.where on a CPU takes as long as a dozen of these operations.
    cosine = cosine.view(torch.int32)
    sine = sine.view(torch.int32)
    swapped = (cosine ^ sine).bitwise_and_(-(quadrant & 1))
    cosine ^= swapped
    cosine ^= ((quadrant + 1) & 2) << 30
    sine ^= swapped
    sine ^= (quadrant & 2) << 30
    return cosine.view(torch.float32), sine.view(torch.float32)


def _polynomial(coefficients: tuple[np.float32, ...], x: torch.Tensor) -> torch.Tensor:
    value = torch.full_like(x, float(coefficients[0]))
    for coefficient in coefficients[1:]:
        value.mul_(x).add_(float(coefficient))
    return value
