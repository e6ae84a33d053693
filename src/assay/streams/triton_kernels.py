"""The kernels of the triton backend: fused, and with the bits of the definition.

A kernel has hash, uniforms, logarithm, sine and root of a pair in registers, and writes to memory
once. The bits are those of :mod:`assay.streams.definition`. Four rewritings, all exact, save
instructions:

- **Powers of two are folded into constants.** Uniforms stay in units of 2**-32, the logarithm is
  half of itself, cosine and sine twice themselves. Scaling by a power of two commutes with every
  rounding, as nothing is subnormal.
- **The hash is cut at the seed.** ``rotl(s ^ k, 13) = rotl(s, 13) ^ rotl(k, 13)``: all before that
  depends on the index alone and stays in registers over the rows of a program.
- **Signs move to the radius.** A product is the same whichever factor has the sign, zeros included.
- **The root has no branch** (``root``).

Gain on one H200, for the normals of a batch in float16: 119 times as fast as the torch backend at
64 x 256 x 4096, and 1.46 times as fast as ``torch.randn``, which makes other numbers
(``python research/benchmarks/streams.py normals --device cuda``, gpu_normals.json).

The kernels must be launched with ``enable_fp_fusion=False``. By default the compiler contracts a
multiply and an add into one operation that rounds once.

Shapes: ``B`` streams of a batch, ``N`` elements of each, ``S`` sub-seeds of a stream, ``D``
coordinates, ``R`` reflections. Where noise is added: ``N`` rows that get it, ``R`` rows of scores,
``V`` columns, ``W`` words.
"""

from __future__ import annotations

import triton
import triton.language as tl

from assay.streams import definition

# Kernels are written in triton's language, which has no annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

# Uniforms are in units of 2**-32, their doubles of Gumbel numbers in units of 2**-33.
_MIN_U1 = tl.constexpr(float(definition.MIN_U1) * 2.0**32)
_LOG1P_SPLIT = tl.constexpr(float(definition.LOG1P_SPLIT) * 2.0**33)
_SQRT_HALF_BITS = tl.constexpr(int(definition.SQRT_HALF_BITS))
# Half the logarithm as a function of f / 2; k comes negative and in units of 2**23, where exponents
# stand.
_LN2_HIGH = tl.constexpr(float(definition.LN2_HIGH) * 2.0**-24)
_LN2_LOW = tl.constexpr(float(definition.LN2_LOW) * 2.0**-24)
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
def root(x):
    """The correctly rounded square root of 0 and of values from 2**-30 to 16; no others occur.

    It is what ``sqrt.rn.f32`` becomes in the machine, an estimate and one step of Newton with a
    fused residual, without the test for values out of range: that is a branch for every pair, and
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
    f = (bits - exponent - ((unit + 1) << 23)).to(tl.float32, bitcast=True) - 0.5
    return f, exponent.to(tl.float32)


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
def gumbel(h):
    """The Gumbel number of a hash; f and k are selected first, and one logarithm is taken."""
    x = (tl.minimum(h, ~h) * 2 + 1).to(tl.float32)  # in units of 2**-33
    f, minus_k = _split(x, 33)
    halved = x > _LOG1P_SPLIT
    scaled = x * -(2.0**-33)
    upper_f = tl.where(halved, 0.5 + scaled, 0.5 * scaled)
    upper_minus_k = tl.where(halved, -(2.0**23), 0.0)
    is_upper = h.to(tl.int32, bitcast=True) >= 0
    f = tl.where(is_upper, upper_f, f)
    minus_k = tl.where(is_upper, upper_minus_k, minus_k)
    half = _half_negative_log_of_parts(f, minus_k)
    return 2.0 * _half_negative_log(half, -1)  # E is twice its half


@triton.jit
def _box_muller(h1, h2):
    """Two normals from two hashes."""
    radius = root(_half_negative_log(tl.maximum(h1.to(tl.float32), _MIN_U1), 32))
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
    # Times minus one, since triton's minus sign is 0 - x, which makes +0 of a zero instead of -0.
    return radius * tl.where(odd, sine * -1.0, cosine), radius * tl.where(odd, cosine, sine)


@triton.jit
def _normals_of_pair(rotated_seed, index, pairs, kind: tl.constexpr):
    cosine, sine = _box_muller(_hash(rotated_seed, index), _hash(rotated_seed, index + pairs))
    return cosine.to(kind), sine.to(kind)


@triton.jit
def _normals_of_2(rotated_seed, index, pairs, kind: tl.constexpr):
    c0, s0 = _normals_of_pair(rotated_seed, index, pairs, kind)
    c1, s1 = _normals_of_pair(rotated_seed, index + 4, pairs, kind)
    return tl.join(c0, c1), tl.join(s0, s1)


@triton.jit
def _normals_of_4(rotated_seed, index, pairs, kind: tl.constexpr):
    c0, s0 = _normals_of_2(rotated_seed, index, pairs, kind)
    c1, s1 = _normals_of_2(rotated_seed, index + 2, pairs, kind)
    return tl.join(c0, c1), tl.join(s0, s1)


@triton.jit
def _normals_of_8(rotated_seed, index, pairs, kind: tl.constexpr):
    """Normals of 8 pairs from every index on; stores of neighbours are then wide.

    A join makes a new last axis, so the last join is that of neighbours.
    """
    c0, s0 = _normals_of_4(rotated_seed, index, pairs, kind)
    c1, s1 = _normals_of_4(rotated_seed, index + 1, pairs, kind)
    cosines = tl.reshape(tl.join(c0, c1), [c0.numel * 2])
    sines = tl.reshape(tl.join(s0, s1), [c0.numel * 2])
    return cosines, sines


@triton.jit(
    do_not_specialize=["rows", "together", "sub_seeds", "n", "length", "pairs", "sine_count"],
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
    sine_count,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normals of sub-seeds ``length`` apart: ``pairs`` cosines each, then ``sine_count`` sines.

    All four lengths are in units of UNIT elements: with 16, stores are wide. The grid is (blocks of
    pairs, groups of rows, sub-seeds); a program makes one block of ``together`` rows.
    """
    sub_seed = tl.program_id(2)
    first = tl.program_id(1).to(tl.int64) * together
    start = tl.program_id(0).to(tl.int64) * BLOCK
    pairs = pairs.to(tl.int64) * UNIT
    place = tl.arange(0, BLOCK)
    has_cosine = place < pairs - start
    has_sine = place < sine_count.to(tl.int64) * UNIT - start
    index = start.to(tl.uint32) + 8 * tl.arange(0, BLOCK // 8).to(tl.uint32)
    row_length = n.to(tl.int64) * UNIT
    out_BN += sub_seed * length.to(tl.int64) * UNIT + start
    for row in range(first, tl.minimum(first + together, rows)):
        rotated_seed = _rotated_seed(tl.load(seeds_BS + row * sub_seeds + sub_seed))
        cosines, sines = _normals_of_8(
            rotated_seed, index, pairs.to(tl.uint32), out_BN.dtype.element_ty
        )
        out = out_BN + row * row_length + place
        tl.store(out, cosines, mask=has_cosine)
        tl.store(out + pairs, sines, mask=has_sine)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["seeds_B", "out_BN"])
def hash_kernel(seeds_B, out_BN, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """A number of each hash: itself, its order among int32, its sign, uniform or Gumbel number."""
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
        values = gumbel(h)
    else:
        values = h.to(tl.int32, bitcast=True)
    tl.store(out_BN + row * n + place, values.to(out_BN.dtype.element_ty), mask=place < n)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["seeds_N", "rows_N"])
def add_gumbels_kernel(
    seeds_N, rows_N, scores_RV, rows, columns, stride, HAS_ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Add Gumbel numbers to rows of scores; a program does BLOCK columns of one row.

    The rows are ``stride`` elements apart.
    """
    blocks = tl.cdiv(columns, BLOCK)
    n = tl.program_id(0) // blocks
    row = n.to(tl.int64)
    if HAS_ROWS:
        row = tl.load(rows_N + n)
    place = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    gumbels = gumbel(_hash(_rotated_seed(tl.load(seeds_N + n)), place.to(tl.uint32)))
    scores = scores_RV + row * stride + place
    # Row numbers on a GPU are not checked before: a wrong one must not write elsewhere.
    if (row >= 0) & (row < rows):
        tl.store(scores, tl.load(scores, mask=place < columns) + gumbels, mask=place < columns)


@triton.jit(
    do_not_specialize=["rows"], do_not_specialize_on_alignment=["words_NW", "steps_N", "seeds_N"]
)
def row_seeds_kernel(words_NW, steps_N, seeds_N, rows, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """The seed of a step for each of BLOCK rows: the step, hashed with one word after the other."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(steps_N + row, mask=row < rows, other=0).to(tl.uint32)
    for word in tl.static_range(WORDS):
        word_seed = tl.load(words_NW + row * WORDS + word, mask=row < rows, other=0)
        seed = _hash(_rotated_seed(word_seed), seed)
    tl.store(seeds_N + row, seed.to(tl.int32, bitcast=True), mask=row < rows)


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit(
    do_not_specialize=["d", "reflections"],
    do_not_specialize_on_alignment=["seeds_BR", "x_BD", "out_BD"],
)
def reflect_kernel(seeds_BR, x_BD, out_BD, d, reflections, BLOCK: tl.constexpr):
    """Reflections ``x - 2 (x v) / (v v) v`` of a row, one for every seed; a program has one row.

    Its BLOCK pairs hold the whole row. The order of summation of v v and x v depends on D alone, so
    a row does not depend on its batch.
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
        v_low, v_high = _normals_of_pair(rotated_seed, index, pairs.to(tl.uint32), tl.float32)
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
