"""Linear layers and experts over weights in eight bits, and the three ways in which such a product is computed.

Each way rounds its input as its weight was rounded, with scales for every position, so that the bits of a position do
not depend on the others: ``float8`` has a scale for a row (:mod:`assay.models.float8`), ``float8-block`` one for some
columns of a row, and ``int8-rows`` one for a row, with products that are exact.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from assay.models.float8 import SMALLEST, STEP, Rounded, by_expert, grouped_product, product, round_rows

__all__ = ["FLOAT8", "INT8", "Arithmetic", "EightBitExperts", "EightBitLinear", "float8_blocks"]

_INT8_LARGEST = 127
Product = Callable[[Rounded, Rounded, Tensor | None, torch.dtype], Tensor]


@dataclass(frozen=True)
class Arithmetic:
    """A way to round inputs and to multiply them by weights.

    Args:
        name: Name of the number format.
        round: Function that rounds the rows of an input.
        product: Function of a rounded input, a rounded weight, a bias and the dtype of the result: x Wᵀ, and the bias.
        grouped: Function that multiplies rows which stand together by a weight each, on CUDA; without it
            a product for each weight.
    """

    name: str
    round: Callable[[Tensor], Rounded]
    product: Product
    grouped: Callable[[Rounded, Rounded, Tensor, torch.dtype], Tensor] | None = None

    def grouped_product(self, x: Rounded, weights: Rounded, ends: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x Wᵀ for rows that stand together where they have one weight.

        Args:
            x: Input, [S, C].
            weights: Weights, [E, R, C].
            ends: Where the rows of each weight end, [E] int32.
            dtype: Dtype of the result.
        """
        if self.grouped is not None and x.values.is_cuda:
            return self.grouped(x, weights, ends, dtype)
        spans = [slice(*span) for span in pairwise([0, *ends.tolist()])]
        parts = [
            self.product(Rounded(*(t[span] for t in x)), Rounded(*(t[expert] for t in weights)), None, dtype)
            for expert, span in enumerate(spans)
        ]
        return torch.cat(parts)


def _round_groups(x: Tensor, columns: int) -> Rounded:
    """Round every group of so many columns of a row to e4m3 by a scale of its own, [..., groups]."""
    groups = torch.split(x, columns, dim=-1)
    largest = torch.stack([group.abs().amax(dim=-1) for group in groups], dim=-1)
    scales = largest.float().clamp_min(SMALLEST) * STEP
    spread = scales.reciprocal().repeat_interleave(columns, dim=-1)[..., : x.shape[-1]]
    return Rounded((x * spread).to(torch.float8_e4m3fn), scales)


def _block_product(
    x: Rounded, weight: Rounded, bias: Tensor | None, dtype: torch.dtype, *, block: tuple[int, int]
) -> Tensor:
    """Return x Wᵀ: the products of each group of columns, times both its scales, summed in the order of the columns."""
    rows, columns = block
    values, scales = x.values.flatten(0, -2), x.scales.flatten(0, -2)
    of_rows = weight.scales.repeat_interleave(rows, dim=0)[: len(weight.values)]
    y = torch.zeros(len(values), len(weight.values), device=values.device)
    for group, start in enumerate(range(0, values.shape[1], columns)):
        part = slice(start, start + columns)
        of_group = values[:, part].float() @ weight.values[:, part].float().t()
        y += of_group * (scales[:, group, None] * of_rows[None, :, group])
    y = y.to(torch.bfloat16).to(dtype).view(*x.values.shape[:-1], len(weight.values))
    return y if bias is None else y + bias


def _round_to_int8(x: Tensor) -> Rounded:
    """Round every row of the last axis to whole numbers from -127 to 127; one with NaN or infinity has such a scale."""
    scales = x.abs().amax(dim=-1, keepdim=True).float().clamp_min(SMALLEST) * (1 / _INT8_LARGEST)
    whole = (x * scales.reciprocal()).round().clamp(-_INT8_LARGEST, _INT8_LARGEST)
    return Rounded(whole.to(torch.int8), scales)


def _int8_product(x: Rounded, weight: Rounded, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x Wᵀ. The sums of products are whole numbers and exact; each is rounded once, and once by every scale."""
    sums = torch._int_mm(x.values.flatten(0, -2), weight.values.t())
    y = (sums.float() * x.scales.flatten(0, -2) * weight.scales.t()).to(dtype)
    y = y.view(*x.values.shape[:-1], len(weight.values))
    return y if bias is None else y + bias


FLOAT8 = Arithmetic("float8", round_rows, product, grouped_product)
INT8 = Arithmetic("int8-rows", _round_to_int8, _int8_product)


def float8_blocks(rows: int, columns: int) -> Arithmetic:
    """Return the arithmetic of weights that have a scale for every block of so many rows and columns."""
    return Arithmetic(
        "float8-block",
        partial(_round_groups, columns=columns),
        partial(_block_product, block=(rows, columns)),
    )


class EightBitLinear(nn.Module):
    """A linear layer that rounds its input and multiplies it by a weight in eight bits.

    Args:
        weight: Weight with its scales.
        bias: Bias, which is not rounded.
        arithmetic: How both are multiplied.
    """

    def __init__(self, weight: Rounded, bias: nn.Parameter | None, arithmetic: Arithmetic = FLOAT8) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.values.shape
        self.arithmetic = arithmetic
        self.weight = nn.Parameter(weight.values, requires_grad=False)
        self.scales = nn.Parameter(weight.scales, requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output in the dtype of its input."""
        rounded = Rounded(self.weight, self.scales)
        return self.arithmetic.product(self.arithmetic.round(x), rounded, self.bias, x.dtype)


class EightBitExperts(nn.Module):
    """The experts of a mixture, over weights in eight bits; called as those of transformers.

    Args:
        experts: Module of transformers with their number and their activation.
        gate_up: Weights of gate and up, [E, 2 F, D].
        down: Weights of down, [E, D, F].
        arithmetic: How inputs and weights are multiplied.
    """

    def __init__(self, experts: Any, gate_up: Rounded, down: Rounded, arithmetic: Arithmetic = FLOAT8) -> None:
        super().__init__()
        self.num_experts, self.act_fn, self.arithmetic = experts.num_experts, experts.act_fn, arithmetic
        for name, (values, scales) in (("gate_up_proj", gate_up), ("down_proj", down)):
            setattr(self, name, nn.Parameter(values, requires_grad=False))
            setattr(self, f"{name}_scales", nn.Parameter(scales, requires_grad=False))

    def rounded(self, name: str) -> Rounded:
        """Return the weights ``gate_up_proj`` or ``down_proj`` of all experts."""
        return Rounded(getattr(self, name), getattr(self, f"{name}_scales"))

    def forward(self, x_ND: Tensor, chosen_NK: Tensor, shares_NK: Tensor) -> Tensor:
        """Return the sum of what the chosen experts return of each row, each by its share."""
        by = self.arithmetic
        order, ends = by_expert(chosen_NK, self.num_experts)
        x = by.round(x_ND)
        rows = order // chosen_NK.shape[1]
        spread = Rounded(x.values.view(torch.uint8)[rows].view(x.values.dtype), x.scales[rows])
        gate, up = by.grouped_product(spread, self.rounded("gate_up_proj"), ends, x_ND.dtype).chunk(2, dim=-1)
        y_SD = by.grouped_product(by.round(self.act_fn(gate) * up), self.rounded("down_proj"), ends, x_ND.dtype)
        shared_SD = torch.empty_like(y_SD)
        shared_SD[order] = y_SD * shares_NK.flatten()[order, None]
        return shared_SD.view(*chosen_NK.shape, -1).sum(dim=1)
