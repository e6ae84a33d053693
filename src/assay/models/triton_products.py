"""Products in eight bits on CUDA that torch does not have, as one triton kernel.

- Products in int8, whose sums torch would write in 32 bits for another pass to read and scale.
- Grouped products, for the experts of a mixture, in int8 or in e4m3 with scales for blocks.

A program computes one tile of the result, whose columns are summed in their order, so the bits of a
row depend neither on the rows beside it nor on how many there are. In int8 they are those of the
definition, whose sums are exact.

Shapes: S rows, C columns of an input, E weights, R rows of each weight, G groups of columns that
    share a scale.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Kernels are written in triton's language, which has no annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: ANN001, ANN202


# Of a program, measured on an H200: rows, columns and depth of its tile, warps, and steps that are
# loaded ahead. A tile in blocks is as wide and as deep as a block, and so has one scale of the
# weight at a time.
_INT8_TILE = {"ROWS": 128, "COLUMNS": 256, "DEPTH": 128, "num_warps": 8, "num_stages": 4}
_BLOCK_TILE = {"ROWS": 128, "COLUMNS": 128, "DEPTH": 128, "num_warps": 8, "num_stages": 4}
_TILES_TOGETHER = 8
"""Rows of tiles that run at the same time and share what they read of the weight."""


@triton.jit
def _rows_of_tile(
    tile, ends, rows, EXPERTS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr
):
    """Return a tile's first row, the end of its weight's rows, and its weight; E past the last."""
    if EXPERTS == 1:
        first = tile * ROWS
        last = rows
        expert = 0
    else:
        number = tl.arange(0, PADDED)
        end = tl.load(ends + number, mask=number < EXPERTS, other=0)
        start = tl.load(ends + number - 1, mask=(number > 0) & (number < EXPERTS), other=0)
        tiles = tl.where(number < EXPERTS, (end - start + ROWS - 1) // ROWS, 0)
        tiles_before = tl.cumsum(tiles, 0) - tiles
        serves = (tiles_before <= tile) & (tile < tiles_before + tiles)
        expert = tl.sum(tl.where(serves, number, 0), 0) + tl.where(
            tl.sum(serves.to(tl.int32), 0) == 0, EXPERTS, 0
        )
        first = tl.sum(tl.where(serves, start + (tile - tiles_before) * ROWS, 0), 0)
        last = tl.sum(tl.where(serves, end, 0), 0)
    return first, last, expert


@triton.jit
def _multiply(
    x,
    weights,
    x_scales,
    weight_scales,
    ends,
    y,
    rows,
    row_tiles,
    row_stride,
    group_stride,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOGETHER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    column_tiles: tl.constexpr = (OUTPUTS + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    band = program // (TOGETHER * column_tiles)
    height = tl.minimum(row_tiles - band * TOGETHER, TOGETHER)
    within = program % (TOGETHER * column_tiles)
    column_tile = within // height
    first, last, expert = _rows_of_tile(
        band * TOGETHER + within % height, ends, rows, EXPERTS, PADDED, ROWS
    )
    if expert < EXPERTS:
        row = first + tl.arange(0, ROWS)
        output = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        top = expert * OUTPUTS + column_tile * COLUMNS
        if BLOCKS:
            groups: tl.constexpr = (WIDTH + DEPTH - 1) // DEPTH
            of_rows = x_scales + row.to(tl.int64) * row_stride
            of_columns = weight_scales + (expert * column_tiles + column_tile) * groups
            sums = tl.zeros((ROWS, COLUMNS), tl.float32)
            for group in range(groups):
                part = tl.dot(x.load([first, group * DEPTH]), weights.load([top, group * DEPTH]).T)
                of_group = tl.load(of_rows + group * group_stride, mask=row < last, other=0.0)
                sums += part * (of_group * tl.load(of_columns + group))[:, None]
        else:
            exact = tl.zeros((ROWS, COLUMNS), tl.int32)
            for start in range(0, WIDTH, DEPTH):
                exact = tl.dot(
                    x.load([first, start]), weights.load([top, start]).T, exact, out_dtype=tl.int32
                )
            of_rows = tl.load(x_scales + row, mask=row < last, other=0.0)
            of_columns = tl.load(
                weight_scales + expert * OUTPUTS + output, mask=output < OUTPUTS, other=0.0
            )
            sums = exact.to(tl.float32) * of_rows[:, None] * of_columns[None, :]
        at = row.to(tl.int64)[:, None] * OUTPUTS + output[None, :]
        tl.store(
            y + at,
            sums.to(y.dtype.element_ty),
            mask=(row < last)[:, None] & (output < OUTPUTS)[None, :],
        )


def multiply(
    x: Tensor,
    x_scales: Tensor,
    weights: Tensor,
    weight_scales: Tensor,
    ends: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return x Wᵀ.

    Args:
        x: Input, [S, C] contiguous.
        x_scales: Scales of the input.
        weights: Weight of all rows, [R, C] contiguous; or the weights of groups of rows that stand
            together, [E, R, C].
        weight_scales: Scales of the weights.
        ends: Where the rows of each weight end, [E] int32; None with one weight.
        dtype: Dtype of the result.
    """
    tile = _INT8_TILE if x.dtype == torch.int8 else _BLOCK_TILE
    rows, width = x.shape
    outputs = weights.shape[-2]
    experts = 1 if ends is None else len(ends)
    # Each weight but one may leave a tile of rows partly empty that the count of all rows does not.
    row_tiles = triton.cdiv(rows, tile["ROWS"]) + experts - 1
    y = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    x_tiles, weight_tiles = (
        TensorDescriptor.from_tensor(values, [tile[side], tile["DEPTH"]])
        for values, side in ((x, "ROWS"), (weights.view(-1, width), "COLUMNS"))
    )
    _multiply[(row_tiles * triton.cdiv(outputs, tile["COLUMNS"]),)](
        x_tiles,
        weight_tiles,
        x_scales,
        weight_scales,
        ends,
        y,
        rows,
        row_tiles,
        *x_scales.stride(),
        EXPERTS=experts,
        PADDED=triton.next_power_of_2(experts),
        WIDTH=width,
        OUTPUTS=outputs,
        BLOCKS=x.dtype != torch.int8,
        TOGETHER=_TILES_TOGETHER,
        **tile,
    )
    return y
