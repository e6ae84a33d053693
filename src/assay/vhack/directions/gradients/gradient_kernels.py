"""The triton kernels of the gradient pass: one pass over memory where torch takes several.

Every sum has one program and a fixed order (no atomics), so results do not change from run to run.
Arithmetic is in float32 whatever the tensors hold; where transformers rounds in between (behind a
norm, behind the activation) so do these, so that the pass stays the one of the unmodified model.

Shapes: N rows of all samples end to end, B samples, R coordinates, M rows of H numbers that are
    normalised.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Kernels are written in triton's language, which has no annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls


_ROWS = 32
_COLUMNS = 64
_ELEMENTS = 1024
_TILE = 4096


@triton.jit
def _segment_products(
    left, right, offsets, out, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    segment = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    start = tl.load(offsets + segment)
    end = tl.load(offsets + segment + 1)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        at = row[:, None] * columns + column[None, :]
        valid = (row < end)[:, None] & inside[None, :]
        a = tl.load(left + at, mask=valid, other=0.0).to(tl.float32)
        b = tl.load(right + at, mask=valid, other=0.0).to(tl.float32)
        total += a * b
    tl.store(out + segment * columns + column, tl.sum(total, axis=0), mask=inside)


@triton.jit
def _normalise(x, weight, y, scale, rows, width, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    at = row[:, None] * width + column[None, :]
    valid = (row < rows)[:, None] & (column < width)[None, :]
    values = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(values * values, axis=1) / width + eps)
    factor = tl.load(weight + column, mask=column < width, other=0.0)
    # transformers rounds to the model's dtype before it multiplies by the weight.
    rounded = (values * root[:, None]).to(factor.dtype).to(tl.float32)
    tl.store(y + at, (rounded * factor.to(tl.float32)[None, :]).to(y.dtype.element_ty), mask=valid)
    tl.store(scale + row, root, mask=row < rows)


@triton.jit
def _normalise_backward(
    dy, x, weight, scale, dx, rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    at = row[:, None] * width + column[None, :]
    valid = (row < rows)[:, None] & (column < width)[None, :]
    root = tl.load(scale + row, mask=row < rows, other=0.0)
    unit = tl.load(x + at, mask=valid, other=0.0).to(tl.float32) * root[:, None]
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    gradient = tl.load(dy + at, mask=valid, other=0.0).to(tl.float32) * factor[None, :]
    along = tl.sum(gradient * unit, axis=1) / width
    result = (gradient - unit * along[:, None]) * root[:, None]
    tl.store(dx + at, result.to(dx.dtype.element_ty), mask=valid)


@triton.jit
def _gate(a, b, out, count, ELEMENTS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    valid = at < count
    x = tl.load(a + at, mask=valid, other=0.0).to(tl.float32)
    other = tl.load(b + at, mask=valid, other=0.0)
    active = (x / (1.0 + tl.exp(0.0 - x))).to(other.dtype).to(tl.float32)
    tl.store(out + at, (active * other.to(tl.float32)).to(out.dtype.element_ty), mask=valid)


@triton.jit
def _gate_backward(dy, a, b, da, db, count, ELEMENTS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    valid = at < count
    gradient = tl.load(dy + at, mask=valid, other=0.0).to(tl.float32)
    x = tl.load(a + at, mask=valid, other=0.0).to(tl.float32)
    other = tl.load(b + at, mask=valid, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(0.0 - x))
    slope = share * (1.0 + x * (1.0 - share))
    tl.store(da + at, (gradient * other * slope).to(da.dtype.element_ty), mask=valid)
    tl.store(db + at, (gradient * x * share).to(db.dtype.element_ty), mask=valid)


def segment_products(left_NR: Tensor, right_NR: Tensor, offsets: Tensor) -> Tensor:
    """Return what `segment_products` of gradient_operations returns, of contiguous tensors."""
    columns = left_NR.shape[1]
    out_BR = torch.empty(len(offsets) - 1, columns, dtype=torch.float32, device=left_NR.device)
    grid = (len(out_BR), triton.cdiv(columns, _COLUMNS))
    _segment_products[grid](
        left_NR, right_NR, offsets, out_BR, columns, ROWS=_ROWS, COLUMNS=_COLUMNS
    )
    return out_BR


def normalise(x_MH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm's output, and its factor ``1 / √(mean x² + eps)`` per row, [M] float32."""
    rows, width = x_MH.shape
    y_MH = torch.empty_like(x_MH)
    scale_M = torch.empty(rows, dtype=torch.float32, device=x_MH.device)
    grid, sizes = _rows(rows, width)
    _normalise[grid](x_MH, weight_H, y_MH, scale_M, rows, width, eps, **sizes)
    return y_MH, scale_M


def normalise_backward(dy_MH: Tensor, x_MH: Tensor, weight_H: Tensor, scale_M: Tensor) -> Tensor:
    """Return the gradient of `normalise` with respect to x."""
    rows, width = x_MH.shape
    dx_MH = torch.empty_like(x_MH)
    grid, sizes = _rows(rows, width)
    _normalise_backward[grid](dy_MH, x_MH, weight_H, scale_M, dx_MH, rows, width, **sizes)
    return dx_MH


def gate(a: Tensor, b: Tensor) -> Tensor:
    """Return ``silu(a) · b``; both are contiguous."""
    out = torch.empty_like(b)
    _gate[(triton.cdiv(b.numel(), _ELEMENTS),)](a, b, out, b.numel(), ELEMENTS=_ELEMENTS)
    return out


def gate_backward(dy: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `gate` with respect to a and b."""
    da = torch.empty_like(a)
    db = torch.empty_like(b)
    _gate_backward[(triton.cdiv(b.numel(), _ELEMENTS),)](
        dy, a, b, da, db, b.numel(), ELEMENTS=_ELEMENTS
    )
    return da, db


def _rows(rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    """Return the grid and sizes of programs that each take several short rows, or one long one."""
    padded = triton.next_power_of_2(width)
    together = max(1, _TILE // padded)
    return (triton.cdiv(rows, together),), {
        "ROWS": together,
        "WIDTH": padded,
        "num_warps": 8 if padded > 1024 else 4,
    }
