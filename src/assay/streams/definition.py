"""The definition of the streams, in numpy; the backends are faster ways to the same bits.

A stream is a function of a 32-bit seed and an element index, so any part of it can be made
anywhere, in any order:

- **seed**: the first 4 bytes of SHA-256 of a text, big endian; a stream of strength 256 has 8
  sub-seeds, all its words.
- **hash**: one MurmurHash3 x86_32 round over the index, *without* the final ``h ^= length`` of the
  standard.
- **uniform**: ``float32(hash) / 2**32``, rounded to nearest even; in [0, 1], and 1.0 does happen.
- **sign**: +1 where the uniform is above one half, else -1.
- **permutation**: the stable argsort of the hashes. Picking k of n takes the k smallest hashes in
  ascending hash order.
- **normal**: Box-Muller over the two halves of an even number of uniforms: first all cosines, then
  all sines.
- **gumbel**: ``-ln E`` of an exponential number ``E = -ln(1 - (hash + 1/2) / 2**32)``; both
  logarithms are those below.

Normals and Gumbel numbers are portable because their arithmetic is: float32 add, subtract and
multiply, bit casts, and one square root, each rounded once to nearest even (IEEE 754), in the order
written here. No fused multiply-add, no library ``log``, ``cos`` or ``sin`` (they differ between
machines), and no value on the way is subnormal, so flush-to-zero modes change nothing. Polynomials
are evaluated by Horner's rule with a rounding after each multiply and after each add.

Shapes: ``B`` streams of a batch, ``N`` elements of each, ``P`` pairs of uniforms, ``S`` sub-seeds
of a stream, ``W`` words of its seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from assay.errors import UsageError

UInts = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float32]

SIGN_THRESHOLD = np.uint32(0x80000081)
"""Smallest hash whose uniform is above 0.5.

0x80000080 lies half way to the next float32 and rounds to even, to 0.5.
"""

MIN_U1 = np.float32(1e-10)
"""Least uniform under the logarithm, in place of 0 (hash 0); the next one is 2**-32 = 2.3e-10."""

SQRT_HALF_BITS = np.int32(0x3F3504F3)
"""Bits of float32 sqrt(1/2), at which u is split as 2**-k * (1 + f).

So 1 + f is in [sqrt(1/2), sqrt(2)), around 1.
"""

MIDDLE = np.uint32(1 << 31)
"""Hashes below it make the upper half of the Gumbel numbers."""

LOG1P_SPLIT = np.float32(0.29289323)
"""1 - sqrt(1/2): above it 1 - x is split as 1/2 * (1 + f).

So 1 + f is in [sqrt(1/2), sqrt(2)) here too.
"""

LN2_HIGH = np.float32(0.693359375)
LN2_LOW = np.float32(-2.12194440e-4)
"""ln 2 in two parts.

The high one has 9 significant bits, so k * LN2_HIGH is exact for every k that occurs, -5 to 33.
"""

ROUND_MAGIC = np.float32(12582912.0)
"""1.5 * 2**23: added to a small float32, it rounds that to an integer in its low bits."""

# Polynomials, highest power first: Chebyshev fits made with 60 digits, each coefficient then
# rounded to float32. tests/streams/test_coefficients.py derives them again and checks the error of
# each.
LN_POLY = tuple(
    np.float32(c)
    for c in (
        0.06971611827611923,
        -0.11479733884334564,
        0.11685419827699661,
        -0.12425687164068222,
        0.14249058067798615,
        -0.1666780263185501,
        0.20000715553760529,
        -0.2499999701976776,
        0.3333333134651184,
    )
)
"""(ln(1 + f) - f + f**2 / 2) / f**3 for 1 + f in [sqrt(1/2), sqrt(2)]."""

SIN_POLY = tuple(
    np.float32(c)
    for c in (0.004602149128913879, -0.07968021929264069, 0.6459634900093079, 0.42920368909835815)
)
"""2 - sin(d * pi/2) / d as a polynomial in x = d**2, for |d| <= 1/2."""

COS_POLY = tuple(
    np.float32(c)
    for c in (-0.0009067399078048766, 0.02086152881383896, -0.253669410943985, 1.2337005138397217)
)
"""(1 - cos(d * pi/2)) / x as a polynomial in x = d**2, for |d| <= 1/2."""


def seed32(text: str) -> int:
    """Return the 32-bit seed of a text: the first 4 bytes of its SHA-256, big endian.

    Raises:
        UsageError: ``text`` is not a string.
    """
    return int.from_bytes(_sha256(text)[:4], "big")


def seeds(texts: Sequence[str], strength: int = 32) -> UInts:
    """Return the seeds of many streams, uint32 ``[B, S]``.

    ``S`` is 1 at strength 32 and 8 at strength 256: the big-endian words of the digest. Word 0 is
    :func:`seed32`.

    Raises:
        UsageError: ``texts`` is one string or holds something else than strings, or the strength is
            neither 32 nor 256.
    """
    if isinstance(texts, str):
        raise UsageError(
            f"one seed text {texts!r}",
            wanted="a sequence of seed texts",
            do="write seeds([text])",
            field="texts",
        )
    if strength not in (32, 256):
        raise UsageError(
            f"strength {strength!r}",
            wanted="32 or 256",
            do="use 32, the published format, or 256",
            field="strength",
        )
    digests = b"".join(_sha256(text) for text in texts)
    words_BW = np.frombuffer(digests, dtype=">u4").reshape(-1, 8)
    return words_BW[:, : strength // 32].astype(np.uint32)


def hashes(seeds_B: UInts, start: int, stop: int) -> UInts:
    """Return the hashes of elements ``start`` to ``stop`` of each stream, uint32 ``[B, N]``.

    ``stop`` is exclusive, so N is ``stop - start``.
    """
    indices = np.arange(start, stop, dtype=np.int64).astype(np.uint32)
    return _hash(seeds_B[:, None], indices)


def step_seeds(words_BW: UInts, steps_BN: UInts) -> UInts:
    """Return the seeds of steps, uint32 ``[B, N]``; the steps are broadcast to the streams.

    A step is hashed with one word of the stream after the other as seed. Every hash is a bijection
    of the index, so different steps of a stream have different seeds.
    """
    seeds_BN = steps_BN
    for word in range(words_BW.shape[1]):
        seeds_BN = _hash(words_BW[:, word, None], seeds_BN)
    return seeds_BN


def uniforms(seeds_B: UInts, start: int, stop: int) -> Floats:
    """Return uniforms in [0, 1], float32 ``[B, N]``.

    The conversion rounds to nearest even; scaling by a power of two is exact.
    """
    return hashes(seeds_B, start, stop).astype(np.float32) * np.float32(2.0**-32)


def signs(seeds_B: UInts, n: int) -> npt.NDArray[np.int8]:
    """Return signs: +1 where ``uniform > 0.5``, else -1, decided from the integer."""
    return np.where(hashes(seeds_B, 0, n) >= SIGN_THRESHOLD, np.int8(1), np.int8(-1))


def permutations(seeds_B: UInts, n: int) -> npt.NDArray[np.int64]:
    """Return permutations of 0..n-1: the stable argsort of n hashes.

    The hash is a bijection, so hashes never tie.
    """
    return np.argsort(hashes(seeds_B, 0, n), axis=1, kind="stable").astype(np.int64)


def picks(seeds_B: UInts, n: int, k: int) -> npt.NDArray[np.int64]:
    """Choose k different indices below n: those of the k smallest hashes, smallest first."""
    return permutations(seeds_B, n)[:, :k]


def normals(seeds_BS: UInts, n: int) -> Floats:
    """Return standard normals, float32 ``[B, n]``.

    Each sub-seed makes ``ceil(n / S)`` of them, and the last ones the remainder.
    """
    length = segment_length(n, seeds_BS.shape[1])
    normals_BN = np.empty((len(seeds_BS), n), np.float32)
    for sub_seed, start in enumerate(range(0, n, length)):
        stop = min(start + length, n)
        normals_BN[:, start:stop] = _plain_normals(seeds_BS[:, sub_seed], stop - start)
    return normals_BN


def gumbels(seeds_B: UInts, start: int, stop: int) -> Floats:
    """Return standard Gumbel numbers ``-ln E``, with E exponential, float32 ``[B, N]``.

    The smaller the hash, the larger the number. ``E = -ln(1 - (h + 1/2) / 2**32)`` is never 0 and
    never infinite. x is the smaller of (h + 1/2) / 2**32 and its complement, so neither tail loses
    digits: -3.13 to 22.87, to the last of 2**32 values.
    """
    h_BN = hashes(seeds_B, start, stop)
    doubled = np.uint32(2) * np.minimum(h_BN, ~h_BN) + np.uint32(1)
    x = doubled.astype(np.float32) * np.float32(2.0**-33)
    exponential = np.where(h_BN < MIDDLE, negative_log1p_minus(x), negative_log(x))
    return negative_log(exponential)


def segment_length(n: int, sub_seeds: int) -> int:
    """Return how many of n normals each sub-seed makes; the last ones make fewer or none.

    It is at least 1, to be the step of a range.
    """
    return max(1, -(-n // sub_seeds))


def box_muller(u1: Floats, u2: Floats) -> tuple[Floats, Floats]:
    """Return two independent normals: ``sqrt(-2 ln u1)`` times cosine and sine of ``u2`` turns."""
    radius = np.sqrt(np.float32(2) * negative_log(np.maximum(u1, MIN_U1)))
    cosine, sine = cos_sin_turn(u2)
    return radius * cosine, radius * sine


def negative_log(u: Floats) -> Floats:
    """Return ``-ln u`` for normal positive u, split as u = 2**-k (1 + f); +0 at u = 1."""
    bits = u.view(np.int32)
    exponent = (bits - SQRT_HALF_BITS) >> np.int32(23)
    k = (-exponent).astype(np.float32)
    f = (bits - (exponent << np.int32(23))).view(np.float32) - np.float32(1)
    return _negative_log_of_parts(k, f)


def negative_log1p_minus(x: Floats) -> Floats:
    """Return ``-ln(1 - x)`` for x from 2**-33 to 1/2.

    1 - x is 1 + f with f = -x, or (1 + f) / 2 with f = 1 - 2x, exactly.
    """
    halved = x > LOG1P_SPLIT
    f = np.where(halved, np.float32(1) - np.float32(2) * x, -x)
    return _negative_log_of_parts(halved.astype(np.float32), f)


def cos_sin_turn(u: Floats) -> tuple[Floats, Floats]:
    """Return ``cos 2 pi u`` and ``sin 2 pi u`` for u in [0, 1].

    The reduction to an eighth of a turn either side is exact.
    """
    quarters = np.float32(4) * u
    shifted = quarters + ROUND_MAGIC
    quadrant = shifted.view(np.int32) & np.int32(3)
    d = quarters - (shifted - ROUND_MAGIC)
    x = d * d
    cosine = np.float32(1) - x * _polynomial(COS_POLY, x)
    sine = np.float32(2) * d - d * _polynomial(SIN_POLY, x)
    odd = (quadrant & 1) == 1
    cos_negative = ((quadrant + 1) & 2) == 2
    sin_negative = (quadrant & 2) == 2
    turned_cosine = np.where(odd, sine, cosine)
    turned_sine = np.where(odd, cosine, sine)
    turned_cosine = np.where(cos_negative, -turned_cosine, turned_cosine)
    turned_sine = np.where(sin_negative, -turned_sine, turned_sine)
    return turned_cosine, turned_sine


def _sha256(text: str) -> bytes:
    if not isinstance(text, str):
        raise UsageError(
            f"seed text {text!r}",
            wanted="a string",
            do="pass the seed text of the stream as str",
            field="texts",
        )
    try:
        return hashlib.sha256(text.encode()).digest()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"seed text {text!r}",
            wanted="text that UTF-8 can encode",
            do="remove lone surrogates",
            field="texts",
        ) from error


def _negative_log_of_parts(k: Floats, f: Floats) -> Floats:
    """Return ``-ln(2**-k (1 + f))`` for 1 + f in [sqrt(1/2), sqrt(2)).

    It is ``k ln 2 - f + f**2/2 - f**3 LN_POLY(f)``.
    """
    square = f * f
    curve = np.float32(0.5) * square - f * square * _polynomial(LN_POLY, f)
    result: Floats = ((k * LN2_LOW + curve) - f) + k * LN2_HIGH
    return result


def _hash(seeds: UInts, indices: UInts) -> UInts:
    """Return the hash of each index under each seed; the two arrays are broadcast."""
    k = indices * np.uint32(0xCC9E2D51)
    k = _rotate_left(k, 15)
    k = k * np.uint32(0x1B873593)
    h = seeds ^ k
    h = _rotate_left(h, 13)
    h = h * np.uint32(5) + np.uint32(0xE6546B64)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    return h


def _plain_normals(seeds_B: UInts, n: int) -> Floats:
    pairs = -(-n // 2)
    # The first half has u1 of every pair, the second half u2.
    uniforms_BN = uniforms(seeds_B, 0, 2 * pairs)
    halves = box_muller(uniforms_BN[:, :pairs], uniforms_BN[:, pairs:])
    return np.concatenate(halves, axis=1)[:, :n]


def _polynomial(coefficients: tuple[np.float32, ...], x: Floats) -> Floats:
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def _rotate_left(x: UInts, bits: int) -> UInts:
    return (x << np.uint32(bits)) | (x >> np.uint32(32 - bits))
