"""Triton kernels between the products of a layer, each one pass over memory.

:mod:`assay.poc.engines.hf.lean_decoder` uses them and says what they gain.

- `normalised`: the residual stream plus an update, and its norm.
- `turned`: queries and keys after their norms and the rotation, written over what they were.
- `gated`: the activated gate times the other projection.
- `rounded`: what attention returns, in eight bits.
- `spread` and `combined`: rows to the experts of a mixture, and back as a sum by shares.

What a product in eight bits reads next is rounded where it is made: `by` says to what, and None
leaves it as it is.

Arithmetic is in float32 and rounds to the dtype of the tensors wherever the modules of transformers
do, so only the order of the sums in a norm, and exponentials, may differ from them in the last
bits. A row has one program, or a fixed part of one, whatever stands beside it; sizes of programs
follow from the shapes and never from a timing.

Shapes: M rows (positions of all nonces), D numbers of a row, N heads of a row, E numbers of a head,
    F width of the MLP.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from assay.models.eight_bits import INT8_STEP, SMALLEST, STEP, Arithmetic, Rounded

# Kernels are written in triton's language, which has no annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls


_SMALLEST = tl.constexpr(SMALLEST)
_STEP = tl.constexpr(STEP)
_INT8_STEP = tl.constexpr(INT8_STEP)
# A float32 this large has no fraction: adding it rounds to the nearest whole number, half to even.
_NO_FRACTION = tl.constexpr(1.5 * 2**23)
# GROUP of a kernel is how many columns share a scale: at 0 all of a row, and at -1 nothing is
# rounded.
_PLAIN = -1
_ROW = 0
_NUMBERS = 4096
"""Numbers in a tile that is not one long row; sizes of programs are measured on an H200."""

_PER_THREAD = 32
"""Numbers that a thread has of a row."""

_HEAD_NUMBERS = 2048
"""Numbers in a tile of heads."""

_WARPS = 4

_EXACT = {"enable_fp_fusion": False}
"""Option under which sums and products round one by one, as the definition's do."""


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(values, axis: tl.constexpr):
    """Return the largest magnitudes along an axis; NaN where there is one."""
    return tl.reduce(tl.abs(values), axis, _larger)


@triton.jit
def _scale(largest, dtype: tl.constexpr):
    """Return the scale of rows or groups and its reciprocal, as the definition has them."""
    step: tl.constexpr = _INT8_STEP if dtype == tl.int8 else _STEP
    scale = _larger(largest, _SMALLEST) * step
    return scale, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def _to(values, dtype: tl.constexpr):
    if dtype == tl.int8:
        values = (values + _NO_FRACTION) - _NO_FRACTION
    return values.to(dtype)


@triton.jit
def _rounded(
    values, dtype: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Return rows rounded as the definition rounds them, and their scales, [ROWS, groups]."""
    groups: tl.constexpr = COLUMNS // GROUP if GROUP > 0 else 1
    if groups == 1:
        scale, factor = _scale(_largest(values, 1)[:, None], dtype)
        values = values * factor
    else:
        parts = tl.reshape(values, (ROWS, groups, GROUP))
        scale, factor = _scale(_largest(parts, 2), dtype)
        values = tl.reshape(parts * factor[:, :, None], (ROWS, COLUMNS))
    return _to(values, dtype), scale


@triton.jit
def _store_scales(
    scales, scale, place, inside, rows, start, GROUP: tl.constexpr, WIDTH: tl.constexpr
):
    """Store the scales of rows at their places; those of a group stand together."""
    group = tl.arange(0, scale.shape[1])[None, :]
    if GROUP > 0:
        group += start // GROUP
    tl.store(
        scales + group * rows + place[:, None],
        scale,
        mask=inside[:, None] & (group * GROUP < WIDTH),
    )


@triton.jit
def _store(
    y,
    at,
    valid,
    values,
    scales,
    row,
    rows,
    start,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store columns of rows from a start on, rounded where GROUP is not negative."""
    stored_dtype: tl.constexpr = y.dtype.element_ty
    if GROUP >= 0:
        values, scale = _rounded(values, stored_dtype, GROUP, ROWS, COLUMNS)
        _store_scales(scales, scale, row, row < rows, rows, start, GROUP, WIDTH)
    tl.store(y + at, values.to(stored_dtype), mask=valid)


@triton.jit
def _normalise(
    h,
    update,
    weight,
    total,
    y,
    scales,
    rows,
    eps,
    ADD: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at = row[:, None] * WIDTH + column[None, :]
    valid = (row < rows)[:, None] & (column < WIDTH)[None, :]
    values = tl.load(h + at, mask=valid, other=0.0).to(tl.float32)
    stored_dtype = weight.dtype.element_ty
    if ADD:
        values = (values + tl.load(update + at, mask=valid, other=0.0).to(tl.float32)).to(
            stored_dtype
        )
        tl.store(total + at, values, mask=valid)
        values = values.to(tl.float32)
    root = tl.rsqrt(tl.sum(values * values, axis=1) / WIDTH + eps)
    factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    normed = (values * root[:, None]).to(stored_dtype).to(tl.float32) * factor[None, :]
    _store(
        y,
        at,
        valid,
        normed.to(stored_dtype).to(tl.float32),
        scales,
        row,
        rows,
        0,
        GROUP,
        WIDTH,
        ROWS,
        COLUMNS,
    )


@triton.jit
def _turn(
    x,
    q_norm,
    k_norm,
    cosines,
    sines,
    rows,
    positions,
    first_position,
    stride,
    eps,
    NORM: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
    PAIRS: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row = number // HEADS
    head = number % HEADS
    pair = tl.arange(0, PAIRS)[None, :]
    inside = pair < HALF
    valid = (row < rows)[:, None] & inside
    at = (row * stride + head * (2 * HALF))[:, None] + pair
    stored_dtype = x.dtype.element_ty
    first = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    second = tl.load(x + at + HALF, mask=valid, other=0.0).to(tl.float32)
    if NORM:
        root = tl.rsqrt(
            (tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * HALF) + eps
        )[:, None]
        query = (head < QUERIES)[:, None]
        q_first = tl.load(q_norm + pair, mask=inside)
        k_first = tl.load(k_norm + pair, mask=inside)
        q_second = tl.load(q_norm + HALF + pair, mask=inside)
        k_second = tl.load(k_norm + HALF + pair, mask=inside)
        first = (first * root).to(stored_dtype).to(tl.float32) * tl.where(
            query, q_first, k_first
        ).to(tl.float32)
        second = (second * root).to(stored_dtype).to(tl.float32) * tl.where(
            query, q_second, k_second
        ).to(tl.float32)
        first = first.to(stored_dtype).to(tl.float32)
        second = second.to(stored_dtype).to(tl.float32)
    angle = (first_position + row % positions)[:, None] * (2 * HALF) + pair
    cosine = tl.load(cosines + angle, mask=valid, other=0.0).to(tl.float32)
    sine = tl.load(sines + angle, mask=valid, other=0.0).to(tl.float32)
    first_turned = (first * cosine).to(stored_dtype).to(tl.float32) - (second * sine).to(
        stored_dtype
    ).to(tl.float32)
    second_turned = (second * cosine).to(stored_dtype).to(tl.float32) + (first * sine).to(
        stored_dtype
    ).to(tl.float32)
    tl.store(x + at, first_turned.to(stored_dtype), mask=valid)
    tl.store(x + at + HALF, second_turned.to(stored_dtype), mask=valid)


@triton.jit
def _gated(gate, up):
    wide = gate.to(tl.float32)
    active = (wide / (1.0 + tl.exp(0.0 - wide))).to(up.dtype).to(tl.float32)
    return (active * up.to(tl.float32)).to(up.dtype).to(tl.float32)


@triton.jit
def _gate(
    x,
    y,
    scales,
    rows,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * COLUMNS
    column = start + tl.arange(0, COLUMNS)[None, :]
    valid = (row < rows)[:, None] & (column < WIDTH)
    at = row[:, None] * (2 * WIDTH) + column
    gate = tl.load(x + at, mask=valid, other=0.0)
    up = tl.load(x + at + WIDTH, mask=valid, other=0.0)
    place = row[:, None] * WIDTH + column
    _store(y, place, valid, _gated(gate, up), scales, row, rows, start, GROUP, WIDTH, ROWS, COLUMNS)


@triton.jit
def _round(
    x,
    y,
    scales,
    rows,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    valid = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    values = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    _store(y, at, valid, values, scales, row, rows, 0, GROUP, WIDTH, ROWS, COLUMNS)


@triton.jit
def _spread(
    x,
    places,
    y,
    scales,
    rows,
    spread_rows,
    TOP: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = row < rows
    valid = inside[:, None] & (column < WIDTH)
    values = tl.load(x + row[:, None] * WIDTH + column, mask=valid, other=0.0)
    if GROUP >= 0:
        values, scale = _rounded(values.to(tl.float32), y.dtype.element_ty, GROUP, ROWS, COLUMNS)
    for number in tl.static_range(TOP):
        place = tl.load(places + row * TOP + number, mask=inside, other=0)
        tl.store(y + place[:, None] * WIDTH + column, values, mask=valid)
        if GROUP >= 0:
            _store_scales(scales, scale, place, inside, spread_rows, 0, GROUP, WIDTH)


@triton.jit
def _combine(
    x,
    places,
    shares,
    y,
    rows,
    TOP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = row < rows
    valid = inside[:, None] & (column < WIDTH)
    stored_dtype = y.dtype.element_ty
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for number in tl.static_range(TOP):
        place = tl.load(places + row * TOP + number, mask=inside, other=0)
        share = tl.load(shares + row * TOP + number, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(x + place[:, None] * WIDTH + column, mask=valid, other=0.0).to(tl.float32)
        total += (values * share[:, None]).to(stored_dtype).to(tl.float32)
    tl.store(y + row[:, None] * WIDTH + column, total.to(stored_dtype), mask=valid)


def normalised(
    h: Tensor, update: Tensor | None, weight_D: Tensor, eps: float, by: Arithmetic | None
) -> tuple[Tensor, Tensor | Rounded]:
    """Return ``h + update``, and its norm; both are contiguous, as the result is."""
    total = h if update is None else torch.empty_like(h)
    inputs = (h, update, weight_D, total)
    rows = h.numel() // h.shape[-1]
    normed = _launch(_normalise, inputs, h.shape, by, rows, eps, ADD=update is not None)
    return total, normed


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
    """Norm and rotate the first heads of every row [..., R] in place; queries stand first.

    Norms are the weights for queries and keys, or None, and the rotation is cosines and sines,
    [positions, 1, E]. Rows count on from the first position up to the last one, then again.
    """
    cosines, sines = rotation
    stride = x.shape[-1]
    rows = x.numel() // stride
    pairs = triton.next_power_of_2(width // 2)
    tile = max(1, _HEAD_NUMBERS // (2 * pairs))
    _turn[(triton.cdiv(rows * heads, tile),)](
        x,
        *norms,
        cosines,
        sines,
        rows,
        len(cosines) - first_position,
        first_position,
        stride,
        eps,
        NORM=norms[0] is not None,
        QUERIES=queries,
        HEADS=heads,
        HALF=width // 2,
        TILE=tile,
        PAIRS=pairs,
        num_warps=_WARPS,
        **_EXACT,
    )


def gated(x: Tensor, by: Arithmetic | None) -> Tensor | Rounded:
    """Return silu(gate) · up of contiguous rows [..., 2 F], which hold the gate and then up."""
    width = x.shape[-1] // 2
    full_rows = by is not None and by.block is None
    shape = (*x.shape[:-1], width)
    return _launch(_gate, (x,), shape, by, x.numel() // (2 * width), full_rows=full_rows)


def rounded(x: Tensor, by: Arithmetic) -> Rounded:
    """Return what ``by.round`` returns of a contiguous tensor."""
    y = _launch(_round, (x,), x.shape, by, x.numel() // x.shape[-1])
    assert isinstance(y, Rounded)
    return y


def spread(x: Tensor, places: Tensor, by: Arithmetic | None) -> Tensor | Rounded:
    """Copy each row of [N, D] to all of its places [S] in the result, which follow one another."""
    rows, width = x.shape
    count = len(places)
    return _launch(_spread, (x, places), (count, width), by, rows, count, TOP=count // rows)


def combined(x: Tensor, places: Tensor, shares: Tensor) -> Tensor:
    """Return the sums [N, D] of the rows that :func:`spread` made of a row, by shares [N, K]."""
    rows, top = shares.shape
    width = x.shape[-1]
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    grid, sizes = _tiles(rows, width, None)
    del sizes["GROUP"]
    _combine[grid](x, places, shares, y, rows, TOP=top, **sizes)
    return y


def _launch(
    kernel: Any,
    inputs: tuple[Tensor | None, ...],
    shape: tuple[int, ...],
    by: Arithmetic | None,
    rows: int,
    *numbers: float,
    full_rows: bool = True,
    **constants: int,
) -> Tensor | Rounded:
    """Run a kernel over the rows of a matrix; return what it writes, rounded where ``by`` says so.

    Its arguments are the inputs, the output, the scales of that, the number of rows, and others.
    """
    x = inputs[0]
    assert x is not None
    y, scales = _outputs(shape, x, by)
    grid, sizes = _tiles(rows, shape[-1], by, full_rows=full_rows)
    kernel[grid](*inputs, y, scales, rows, *numbers, **constants, **sizes)
    return y if scales is None else Rounded(y, scales)


def _outputs(shape: tuple[int, ...], x: Tensor, by: Arithmetic | None) -> tuple[Tensor, Any]:
    """Return empty values and scales; scales of a group are adjacent, as products read them."""
    if by is None:
        return x.new_empty(shape), None
    groups = triton.cdiv(shape[-1], by.block[1]) if by.block else 1
    scales = x.new_empty((groups, *shape[:-1]), dtype=torch.float32)
    return x.new_empty(shape, dtype=by.dtype), scales.movedim(0, -1)


def _tiles(
    rows: int, width: int, by: Arithmetic | None, *, full_rows: bool = True
) -> tuple[tuple[int, ...], dict[str, int]]:
    """Return the grid over a matrix and the options of a program: full rows, or parts of one."""
    group = _PLAIN
    if by is not None:
        group = by.block[1] if by.block else _ROW
    columns = max(group, triton.next_power_of_2(width))
    if not full_rows:
        columns = min(columns, _NUMBERS)
    tile = max(1, _NUMBERS // columns)
    warps = min(32, max(_WARPS, tile * columns // (32 * _PER_THREAD)))
    grid = (triton.cdiv(rows, tile), triton.cdiv(width, columns))
    sizes = {"GROUP": group, "WIDTH": width, "ROWS": tile, "COLUMNS": columns}
    return grid, {**sizes, "num_warps": warps, **_EXACT}
