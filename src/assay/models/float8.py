"""Products in eight bits: numbers in e4m3, with a scale for every row of the weight and every row of the input.

This is the definition; the layers that compute by it are in :mod:`assay.models.eight_bits`. A row is divided by its
largest magnitude, so that it fills the range of the format; the product is one of e4m3 numbers, multiplied by both
scales. A scale of its own for every input row keeps the bits of a row apart from the rows beside it.

On CUDA the product is torch's product with scales by row, which needs widths in multiples of 16 and gives bfloat16. On
a CPU it is a product of the same numbers in float32, in which they and their products are exact.
"""

from typing import NamedTuple

import torch
from torch import Tensor

STEP = 1 / torch.finfo(torch.float8_e4m3fn).max
"""The scale of a row is this times its largest magnitude, which becomes the largest number of the format.

Divisions by a scale are products with its reciprocal: a division by a constant has other bits on a CPU than on CUDA.
"""

SMALLEST = 1e-12
"""The least magnitude that a row is taken to have, so that a row of zeros has a scale."""

WIDTHS = 16
"""What rows and columns of a weight must be multiples of on CUDA."""


class Rounded(NamedTuple):
    """A tensor in eight bits."""

    values: Tensor  # [..., C] e4m3
    scales: Tensor  # [..., 1] float32


def round_rows(x: Tensor) -> Rounded:
    """Round every row of the last axis to e4m3, by a scale that takes its largest magnitude to the format's largest.

    A row with NaN or infinity has NaN after it.
    """
    scales = x.abs().amax(dim=-1, keepdim=True).float().clamp_min(SMALLEST) * STEP
    return Rounded((x * scales.reciprocal()).to(torch.float8_e4m3fn), scales)


def product(
    x: Rounded, weight: Rounded, bias: Tensor | None, dtype: torch.dtype, *, short_sums: bool = False
) -> Tensor:
    """Return x Wᵀ, and the bias where there is one.

    Args:
        x: Input, [..., C].
        weight: Weight, [R, C].
        bias: Bias, [R].
        dtype: Dtype of the result.
        short_sums: Whether CUDA may sum in fewer bits than float32, which is another computation.
    """
    rows, scales = x.values.flatten(0, -2), x.scales.flatten(0, -2)
    if rows.device.type == "cuda":
        y = torch._scaled_mm(
            rows,
            weight.values.t(),
            scale_a=scales,
            scale_b=weight.scales.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=short_sums,
        )
    else:
        y = (rows.float() @ weight.values.float().t() * scales * weight.scales.t()).to(torch.bfloat16)
    y = y.to(dtype).view(*x.values.shape[:-1], len(weight.values))
    return y if bias is None else y + bias


def grouped_product(x: Rounded, weights: Rounded, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x Wᵀ on CUDA for rows that stand together where they have one weight.

    Args:
        x: Input, [S, C].
        weights: Weights, [E, R, C].
        ends: Where the rows of each weight end, [E] int32.
        dtype: Dtype of the result.
    """
    y = torch._scaled_grouped_mm(
        x.values,
        weights.values.transpose(-2, -1),
        x.scales.squeeze(-1),
        weights.scales.squeeze(-1),
        offs=ends,
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )
    return y.to(dtype)


def by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return the order of all choices by their expert, and where the choices of each expert end, [E] int32."""
    keys = chosen.flatten().to(torch.uint8 if experts <= 256 else torch.int32)
    keys, order = torch.sort(keys, stable=True)
    numbers = torch.arange(experts, dtype=torch.int32, device=keys.device)
    return order, torch.searchsorted(keys.int(), numbers, right=True, out_int32=True)
