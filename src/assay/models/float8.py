"""Products in eight bits: numbers in e4m3, with a scale for every row of the weight and every row of the input.

This is the definition, and a linear layer that computes by it. A row is divided by its largest magnitude, so that it
fills the range of the format; the product is one of e4m3 numbers, multiplied by both scales. A scale of its own for
every input row keeps the bits of a row apart from the rows beside it.

On CUDA the product is torch's product with scales by row, which needs widths in multiples of 16 and gives bfloat16. On
a CPU it is a product of the same numbers in float32, in which they and their products are exact.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["SMALLEST", "STEP", "WIDTHS", "Float8Linear", "Rounded", "product", "round_rows"]

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


def product(x: Rounded, weight: Rounded, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x Wᵀ, and the bias where there is one.

    Args:
        x: Input, [..., C].
        weight: Weight, [R, C].
        bias: Bias, [R].
        dtype: Dtype of the result.
    """
    rows, scales = x.values.flatten(0, -2), x.scales.flatten(0, -2)
    if rows.device.type == "cuda":
        y = torch._scaled_mm(
            rows,
            weight.values.t(),
            scale_a=scales,
            scale_b=weight.scales.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=False,  # which would sum in fewer bits than float32
        )
    else:
        y = (rows.float() @ weight.values.float().t() * scales * weight.scales.t()).to(torch.bfloat16)
    y = y.to(dtype).view(*x.values.shape[:-1], -1)
    return y if bias is None else y + bias


class Float8Linear(nn.Module):
    """A linear layer that rounds its input and multiplies it by a weight in eight bits.

    Args:
        linear: Layer whose weight is rounded. The bias stays as it is.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        values, scales = round_rows(linear.weight.detach())
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output in the dtype of its input."""
        return product(round_rows(x), Rounded(self.weight, self.scales), self.bias, x.dtype)
