# Kernels are written in triton's language, which has no annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: ANN001, ANN202
"""What stands between the products of a layer, as triton kernels: each passes once over what it reads and writes.

- `normalised`: the residual stream plus an update, and its norm; in float8 the norm rounded, too.
- `turned`: queries and keys after their norms and the rotation, written over what they were.
- `gated`: the activated gate times the other projection; in float8 rounded, too.
- `rounded`: what attention returns, in float8.
- `spread` and `combined`: rows to the experts of a mixture, in float8 rounded, and back as a sum by shares.

Arithmetic is in float32 and rounds to the dtype of the tensors wherever the modules of transformers do, so only the
order of the sums in a norm, and exponentials, may differ from them in the last bits. A row has one program, or a fixed
part of one, whatever stands beside it; sizes of programs follow from the shapes and never from a timing.

Shapes: M rows (positions of all nonces), D numbers of a row, N heads of a row, E numbers of a head, F width of the MLP.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from assay.models.float8 import SMALLEST, STEP, Rounded

_SMALLEST, _STEP = tl.constexpr(SMALLEST), tl.constexpr(STEP)


# Of a program, measured on an H200: numbers in a tile that is not one long row, and how many a thread has of a row.
_NUMBERS, _PER_THREAD = 4096, 32
_HEAD_NUMBERS = 2048
_WARPS = 4
# Sums and products round one by one, as the definition's do.
_EXACT = {"enable_fp_fusion": False}


@triton.jit
def _scales(largest, scales, row, rows):
    """Store the scales of rows and return their reciprocals, as the definition has them."""
    scale = tl.maximum(largest, _SMALLEST) * _STEP
    tl.store(scales + row, scale, mask=row < rows)
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None]


@triton.jit
def _store(y, at, valid, values, scales, row, rows, FLOAT8: tl.constexpr):
    """Store whole rows as they are, or rounded as the definition rounds them."""
    if FLOAT8:
        values = values * _scales(tl.max(tl.abs(values), axis=1), scales, row, rows)
    tl.store(y + at, values.to(y.dtype.element_ty), mask=valid)


@triton.jit
def _normalise(
    h, update, weight, total, y, scales, rows, eps,
    ADD: tl.constexpr, FLOAT8: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at = row[:, None] * WIDTH + column[None, :]
    valid = (row < rows)[:, None] & (column < WIDTH)[None, :]
    values = tl.load(h + at, mask=valid, other=0.0).to(tl.float32)
    kept = weight.dtype.element_ty
    if ADD:
        values = (values + tl.load(update + at, mask=valid, other=0.0).to(tl.float32)).to(kept)
        tl.store(total + at, values, mask=valid)
        values = values.to(tl.float32)
    root = tl.rsqrt(tl.sum(values * values, axis=1) / WIDTH + eps)
    factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    normed = (values * root[:, None]).to(kept).to(tl.float32) * factor[None, :]
    _store(y, at, valid, normed.to(kept).to(tl.float32), scales, row, rows, FLOAT8)


@triton.jit
def _turn(
    x, q_norm, k_norm, cosines, sines, rows, positions, first_position, stride, eps,
    NORM: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    TILE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row, head = number // HEADS, number % HEADS
    pair = tl.arange(0, PAIRS)[None, :]
    inside = pair < HALF
    valid = (row < rows)[:, None] & inside
    at = (row * stride + head * (2 * HALF))[:, None] + pair
    kept = x.dtype.element_ty
    first = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    second = tl.load(x + at + HALF, mask=valid, other=0.0).to(tl.float32)
    if NORM:
        root = tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * HALF) + eps)[:, None]
        query = (head < QUERIES)[:, None]
        q_first, k_first = tl.load(q_norm + pair, mask=inside), tl.load(k_norm + pair, mask=inside)
        q_second, k_second = tl.load(q_norm + HALF + pair, mask=inside), tl.load(k_norm + HALF + pair, mask=inside)
        first = (first * root).to(kept).to(tl.float32) * tl.where(query, q_first, k_first).to(tl.float32)
        second = (second * root).to(kept).to(tl.float32) * tl.where(query, q_second, k_second).to(tl.float32)
        first, second = first.to(kept).to(tl.float32), second.to(kept).to(tl.float32)
    angle = (first_position + row % positions)[:, None] * (2 * HALF) + pair
    cosine = tl.load(cosines + angle, mask=valid, other=0.0).to(tl.float32)
    sine = tl.load(sines + angle, mask=valid, other=0.0).to(tl.float32)
    left = (first * cosine).to(kept).to(tl.float32) - (second * sine).to(kept).to(tl.float32)
    right = (second * cosine).to(kept).to(tl.float32) + (first * sine).to(kept).to(tl.float32)
    tl.store(x + at, left.to(kept), mask=valid)
    tl.store(x + at + HALF, right.to(kept), mask=valid)


@triton.jit
def _gate_part(x, row, rows, start, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Return a part of the gate and of the other projection, and where it is in a row of the result."""
    column = start + tl.arange(0, COLUMNS)[None, :]
    valid = (row < rows)[:, None] & (column < WIDTH)
    at = row[:, None] * (2 * WIDTH) + column
    gate = tl.load(x + at, mask=valid, other=0.0)
    return gate, tl.load(x + at + WIDTH, mask=valid, other=0.0), row[:, None] * WIDTH + column, valid


@triton.jit
def _gated(gate, up):
    wide = gate.to(tl.float32)
    active = (wide / (1.0 + tl.exp(0.0 - wide))).to(up.dtype).to(tl.float32)
    return (active * up.to(tl.float32)).to(up.dtype).to(tl.float32)


@triton.jit
def _gate(x, y, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    gate, up, at, valid = _gate_part(x, row, rows, tl.program_id(1) * COLUMNS, WIDTH, COLUMNS)
    tl.store(y + at, _gated(gate, up).to(y.dtype.element_ty), mask=valid)


@triton.jit
def _gate_and_round(
    x, y, scales, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr,
):  # fmt: skip
    # Three parts leave fewer lanes idle than one of the next power of two. All are read before any is reduced.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    a_gate, a_up, a_at, a_valid = _gate_part(x, row, rows, 0, WIDTH, FIRST)
    if SECOND:
        b_gate, b_up, b_at, b_valid = _gate_part(x, row, rows, FIRST, WIDTH, SECOND)
    if THIRD:
        c_gate, c_up, c_at, c_valid = _gate_part(x, row, rows, FIRST + SECOND, WIDTH, THIRD)
    a = _gated(a_gate, a_up)
    if SECOND:
        b = _gated(b_gate, b_up)
    if THIRD:
        c = _gated(c_gate, c_up)
    largest = tl.max(tl.abs(a), axis=1)
    if SECOND:
        largest = tl.maximum(largest, tl.max(tl.abs(b), axis=1))
    if THIRD:
        largest = tl.maximum(largest, tl.max(tl.abs(c), axis=1))
    factor = _scales(largest, scales, row, rows)
    tl.store(y + a_at, (a * factor).to(y.dtype.element_ty), mask=a_valid)
    if SECOND:
        tl.store(y + b_at, (b * factor).to(y.dtype.element_ty), mask=b_valid)
    if THIRD:
        tl.store(y + c_at, (c * factor).to(y.dtype.element_ty), mask=c_valid)


@triton.jit
def _round(x, y, scales, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    valid = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    _store(y, at, valid, tl.load(x + at, mask=valid, other=0.0).to(tl.float32), scales, row, rows, True)


@triton.jit
def _spread(
    x, places, y, scales, rows, TOP: tl.constexpr, FLOAT8: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = row < rows
    valid = inside[:, None] & (column < WIDTH)
    values = tl.load(x + row[:, None] * WIDTH + column, mask=valid, other=0.0)
    if FLOAT8:
        wide = values.to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(wide), axis=1), _SMALLEST) * _STEP
        values = wide * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None]
    values = values.to(y.dtype.element_ty)
    for number in tl.static_range(TOP):
        place = tl.load(places + row * TOP + number, mask=inside, other=0)
        tl.store(y + place[:, None] * WIDTH + column, values, mask=valid)
        if FLOAT8:
            tl.store(scales + place, scale, mask=inside)


@triton.jit
def _combine(
    x, places, shares, y, rows, TOP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = row < rows
    valid = inside[:, None] & (column < WIDTH)
    kept = y.dtype.element_ty
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for number in tl.static_range(TOP):
        place = tl.load(places + row * TOP + number, mask=inside, other=0)
        share = tl.load(shares + row * TOP + number, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(x + place[:, None] * WIDTH + column, mask=valid, other=0.0).to(tl.float32)
        total += (values * share[:, None]).to(kept).to(tl.float32)
    tl.store(y + row[:, None] * WIDTH + column, total.to(kept), mask=valid)


def normalised(
    h: Tensor, update: Tensor | None, weight_D: Tensor, eps: float, *, float8: bool
) -> tuple[Tensor, Tensor | Rounded]:
    """Return ``h + update``, and its norm; both are contiguous, as the result is."""
    width = h.shape[-1]
    rows = h.numel() // width
    total = h if update is None else torch.empty_like(h)
    y, scales = _outputs(h, width, float8)
    grid, sizes = _tiles(rows, width)
    _normalise[grid](
        h, update, weight_D, total, y, scales, rows, eps, ADD=update is not None, FLOAT8=float8, WIDTH=width, **sizes
    )
    return total, y if scales is None else Rounded(y, scales)


def turned(
    x: Tensor,
    norms: tuple[Tensor | None, Tensor | None],
    rotation: tuple[Tensor, Tensor],
    eps: float,
    *,
    queries: int,
    heads: int,
    width: int,
    first_position: int = 0,
) -> None:
    """Norm and rotate the first heads of every row in place.

    Args:
        x: Outputs of the projections into attention, [..., R] contiguous, of which the first heads are queries.
        norms: Weights of the norms of queries and keys, or None.
        rotation: Cosines and sines, [positions, 1, E].
        eps: Epsilon of the norms.
        queries: Number of queries.
        heads: Number of queries and keys.
        width: Width of a head, E.
        first_position: Position of the first row; later rows count on from it up to the last position, then again.
    """  # fmt: skip
    cosines, sines = rotation
    stride = x.shape[-1]
    rows = x.numel() // stride
    pairs = triton.next_power_of_2(width // 2)
    tile = max(1, _HEAD_NUMBERS // (2 * pairs))
    _turn[(triton.cdiv(rows * heads, tile),)](
        x, *norms, cosines, sines, rows, len(cosines) - first_position, first_position, stride, eps,
        NORM=norms[0] is not None, QUERIES=queries, HEADS=heads, HALF=width // 2,
        TILE=tile, PAIRS=pairs, num_warps=_WARPS, **_EXACT,
    )  # fmt: skip


def gated(x: Tensor, *, float8: bool) -> Tensor | Rounded:
    """Return silu(gate) · up for rows that hold the gate and then the other projection, [..., 2 F] contiguous."""
    width = x.shape[-1] // 2
    rows = x.numel() // (2 * width)
    y, scales = _outputs(x, width, float8)
    if scales is None:
        grid, sizes = _tiles(rows, width, whole=False)
        _gate[grid](x, y, rows, WIDTH=width, **sizes)
        return y
    first, second, third = _parts(width)
    tile = max(1, _NUMBERS // (2 * first))
    warps = min(32, max(_WARPS, tile * first // (32 * _PER_THREAD)))
    _gate_and_round[(triton.cdiv(rows, tile),)](
        x, y, scales, rows, WIDTH=width, ROWS=tile, FIRST=first, SECOND=second, THIRD=third, num_warps=warps, **_EXACT
    )
    return Rounded(y, scales)


def rounded(x: Tensor) -> Rounded:
    """Return what :func:`assay.models.float8.round_rows` returns of a contiguous tensor."""
    width = x.shape[-1]
    rows = x.numel() // width
    y, scales = _outputs(x, width, float8=True)
    assert scales is not None
    grid, sizes = _tiles(rows, width)
    _round[grid](x, y, scales, rows, WIDTH=width, **sizes)
    return Rounded(y, scales)


def spread(x: Tensor, places: Tensor, *, float8: bool) -> Tensor | Rounded:
    """Return each row in all of its places, in float8 rounded.

    Args:
        x: Rows, [N, D] contiguous.
        places: Places of the rows in the result, those of one row together, [S].
        float8: Whether to round.
    """
    rows, width = x.shape
    y, scales = _outputs(x.new_empty(0).expand(len(places), 0), width, float8)
    grid, sizes = _tiles(rows, width)
    _spread[grid](x, places, y, scales, rows, TOP=len(places) // rows, FLOAT8=float8, WIDTH=width, **sizes)
    return y if scales is None else Rounded(y, scales)


def combined(x: Tensor, places: Tensor, shares: Tensor) -> Tensor:
    """Return the sum of the rows that :func:`spread` made of each row, by their shares [N, K], [N, D]."""
    rows, top = shares.shape
    width = x.shape[-1]
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    grid, sizes = _tiles(rows, width)
    _combine[grid](x, places, shares, y, rows, TOP=top, WIDTH=width, **sizes)
    return y


def _outputs(x: Tensor, width: int, float8: bool) -> tuple[Tensor, Tensor | None]:
    shape = (*x.shape[:-1], width)
    y = torch.empty(shape, dtype=torch.float8_e4m3fn if float8 else x.dtype, device=x.device)
    return y, torch.empty(*shape[:-1], 1, dtype=torch.float32, device=x.device) if float8 else None


def _tiles(rows: int, width: int, *, whole: bool = True) -> tuple[tuple[int, ...], dict[str, int]]:
    """Return the grid over the rows of a matrix, and the shape of a program's tile: whole rows, or parts of one."""
    columns = triton.next_power_of_2(width)
    if not whole:
        columns = min(columns, _NUMBERS)
    tile = max(1, _NUMBERS // columns)
    warps = min(32, max(_WARPS, tile * columns // (32 * _PER_THREAD)))
    return (triton.cdiv(rows, tile), triton.cdiv(width, columns)), {
        "ROWS": tile, "COLUMNS": columns, "num_warps": warps, **_EXACT
    }  # fmt: skip


def _parts(width: int) -> tuple[int, int, int]:
    """Return three powers of two that cover a width, each at most half of the one before and the last perhaps 0."""
    first = 1 << (width.bit_length() - 1)
    left = width - first
    second = 1 << (left.bit_length() - 1) if left else 0
    left -= second
    return first, second, triton.next_power_of_2(left) if left else 0
