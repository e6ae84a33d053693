"""Linear layers and experts over weights in eight bits, and how their products are computed.

Weights come in eight bits from a checkpoint, or are rounded to float8 (:func:`round_linears`): an
honest configuration that a network may agree on.

This is the definition. Each way rounds its input as its weight was rounded, with scales for every
position, so that the bits of a position do not depend on the others: a row, or some of its columns,
is divided by its largest magnitude.

- ``float8``: e4m3 with one scale for a row. On CUDA it is torch's product, which needs widths in
  multiples of 16 and gives bfloat16. On a CPU it is a product in float32, in which e4m3 numbers and
  their products are exact.
- ``float8-block``: e4m3 with one scale for some columns of a row. On CUDA, blocks of 128 x 128 are
  torch's product.
- ``int8-rows``: int8 with one scale for a row; the sums are exact. On CUDA these products, and
  those of experts in blocks, are a kernel of assay's own (:mod:`assay.models.triton_products`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from assay.errors import ModelError

STEP = 1 / torch.finfo(torch.float8_e4m3fn).max
"""The scale of a row is this times its largest magnitude, which becomes the largest number of the
format.

Divisions by a scale are products with its reciprocal: a division by a constant has other bits on a
CPU than on CUDA.
"""

SMALLEST = 1e-12
"""The least magnitude that a row is taken to have, so that a row of zeros has a scale."""

WIDTHS = 16
"""What rows and columns of a weight must be multiples of on CUDA."""

# Modules of transformers that multiply by matrices of their own: of GPT-2, and experts of DBRX.
_PLAIN_MATRICES = ("Conv1D", "DbrxExpertGLU")

_INT8_LARGEST = 127

INT8_STEP = 1 / _INT8_LARGEST
"""The scale of a row in int8 is this times its largest magnitude, which becomes 127."""

CUDA_BLOCK = (128, 128)
"""Rows and columns of a weight that share a scale, of which products exist on CUDA."""

# torch's product by blocks reads the scales of rows, and of a weight's columns, in vectors of this
# many.
_SCALES_OF_A_VECTOR = 4

# Sums of so many rows at a time stay in a core's cache until they are scaled: 1.6 to 3 times as
# fast as all at once.
_ROWS_IN_CACHE = 256


class Rounded(NamedTuple):
    """A tensor in eight bits."""

    values: Tensor  # [..., C] e4m3
    scales: Tensor  # [..., 1] float32


def round_rows(x: Tensor) -> Rounded:
    """Round rows of the last axis to e4m3, so that the largest magnitude becomes the format's.

    A row with NaN or infinity has NaN after it.
    """
    scales = x.abs().amax(dim=-1, keepdim=True).float().clamp_min(SMALLEST) * STEP
    return Rounded((x * scales.reciprocal()).to(torch.float8_e4m3fn), scales)


def multiply_rows(
    x: Rounded, weight: Rounded, dtype: torch.dtype, *, short_sums: bool = False
) -> Tensor:
    """Return x Wᵀ [S, R] of an input [S, C] and a weight [R, C] in e4m3 with scales by row.

    With short sums CUDA may sum in fewer bits than float32, which is another computation.
    """
    if x.values.device.type == "cuda":
        y = torch._scaled_mm(
            x.values,
            weight.values.t(),
            scale_a=x.scales,
            scale_b=weight.scales.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=short_sums,
        )
    else:
        y = (x.values.float() @ weight.values.float().t() * x.scales * weight.scales.t()).to(
            torch.bfloat16
        )
    return y.to(dtype)


def grouped_product(x: Rounded, weights: Rounded, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x Wᵀ on CUDA of rows [S, C] sorted by weight [E, R, C], whose ends are ``ends``."""
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


def sort_by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return all choices sorted by expert, and where those of each expert end, [E] int32."""
    keys = chosen.flatten().to(torch.uint8 if experts <= 256 else torch.int32)
    keys, order = torch.sort(keys, stable=True)
    numbers = torch.arange(experts, dtype=torch.int32, device=keys.device)
    return order, torch.searchsorted(keys.int(), numbers, right=True, out_int32=True)


@dataclass(frozen=True)
class Arithmetic:
    """A way to round inputs and to multiply them by weights.

    Args:
        name: Name of the number format.
        round: Function that rounds the rows of an input.
        multiply: Function of a rounded input [S, C], a rounded weight [R, C] and the dtype of the
            result: x Wᵀ.
        grouped: Function that multiplies rows which stand together by a weight each, on CUDA.
        dtype: Dtype of rounded values.
        block: Rows and columns of a weight that share a scale, as so many columns of an input do;
            None where a whole row does.
    """

    name: str
    round: Callable[[Tensor], Rounded]
    multiply: Callable[[Rounded, Rounded, torch.dtype], Tensor]
    grouped: Callable[[Rounded, Rounded, Tensor, torch.dtype], Tensor]
    dtype: torch.dtype = torch.float8_e4m3fn
    block: tuple[int, int] | None = None

    def product(
        self, x: Rounded, weight: Rounded, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Return x Wᵀ + b [..., R] of an input [..., C], a weight [R, C] and a bias [R] or None."""
        y = self.multiply(Rounded(x.values.flatten(0, -2), x.scales.flatten(0, -2)), weight, dtype)
        y = y.view(*x.values.shape[:-1], len(weight.values))
        return y if bias is None else y + bias

    def grouped_product(
        self, x: Rounded, weights: Rounded, ends: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Return x Wᵀ of rows [S, C] sorted by weight [E, R, C]; those of each end at ``ends``."""
        if x.values.is_cuda:
            return self.grouped(x, weights, ends, dtype)
        products = []
        for expert, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
            rows = Rounded(*(part[start:end] for part in x))
            weight = Rounded(*(part[expert] for part in weights))
            products.append(self.multiply(rows, weight, dtype))
        return torch.cat(products)


def _round_groups(x: Tensor, columns: int) -> Rounded:
    """Round every group of columns of a row to e4m3, each by a scale, [..., groups]."""
    groups = torch.split(x, columns, dim=-1)
    largest = torch.stack([group.abs().amax(dim=-1) for group in groups], dim=-1)
    scales = largest.float().clamp_min(SMALLEST) * STEP
    spread = scales.reciprocal().repeat_interleave(columns, dim=-1)[..., : x.shape[-1]]
    return Rounded((x * spread).to(torch.float8_e4m3fn), scales)


def _multiply_blocks(
    x: Rounded, weight: Rounded, dtype: torch.dtype, *, block: tuple[int, int]
) -> Tensor:
    """Return x Wᵀ: products of each group of columns, scaled, summed in the order of columns."""
    if x.values.is_cuda:
        y: Tensor = _library_block_product(*x, *weight)
    else:
        rows, columns = block
        weight_scales = weight.scales.repeat_interleave(rows, dim=0)[: len(weight.values)]
        y = torch.zeros(len(x.values), len(weight.values))
        # The scales of a block belong to the sum over its columns alone.
        for group, start in enumerate(range(0, x.values.shape[1], columns)):
            part = slice(start, start + columns)
            product = x.values[:, part].float() @ weight.values[:, part].float().t()
            y += product * (x.scales[:, group, None] * weight_scales[None, :, group])
        y = y.to(torch.bfloat16)
    return y.to(dtype)


# One operation for those who trace a model.
@torch.library.custom_op("assay::product_of_blocks", mutates_args=())
def _library_block_product(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor
) -> Tensor:
    """Return x Wᵀ in bfloat16 by torch's product with scales for blocks of :data:`CUDA_BLOCK`.

    The input is [M, C] with scales [M, groups], the weight [R, C] with scales [blocks of rows,
    groups].
    """
    rows, groups = x_scales.shape
    if padding := -rows % _SCALES_OF_A_VECTOR:
        x = functional.pad(x.view(torch.uint8), (0, 0, 0, padding)).view(x.dtype)
        x_scales = functional.pad(x_scales, (0, 0, 0, padding))
    y: Tensor = functional.scaled_mm(
        x,
        weight.t(),
        scale_a=x_scales.t().contiguous().t(),  # no copy for scales that the engine's kernels wrote
        scale_recipe_a=functional.ScalingType.BlockWise1x128,
        scale_b=functional.pad(weight_scales, (0, -groups % _SCALES_OF_A_VECTOR)).t(),
        scale_recipe_b=functional.ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )
    return y[:rows]


@_library_block_product.register_fake
def _(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight), dtype=torch.bfloat16)


@torch.library.custom_op("assay::product_in_eight_bits", mutates_args=())
def _own_product(
    x: Tensor,
    x_scales: Tensor,
    weights: Tensor,
    weight_scales: Tensor,
    ends: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the product of :mod:`assay.models.triton_products`, which imports triton."""
    from assay.models.triton_products import multiply

    return multiply(x, x_scales, weights, weight_scales, ends, dtype)


@_own_product.register_fake
def _(
    x: Tensor,
    x_scales: Tensor,
    weights: Tensor,
    weight_scales: Tensor,
    ends: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(len(x), weights.shape[-2], dtype=dtype)


def _round_to_int8(x: Tensor) -> Rounded:
    """Round rows of the last axis to integers from -127 to 127; a scale may be NaN or infinity."""
    scales = x.abs().amax(dim=-1, keepdim=True).float().clamp_min(SMALLEST) * INT8_STEP
    values = (x * scales.reciprocal()).round_().clamp_(-_INT8_LARGEST, _INT8_LARGEST)
    return Rounded(values.to(torch.int8), scales)


def _multiply_int8(x: Rounded, weight: Rounded, dtype: torch.dtype) -> Tensor:
    """Return x Wᵀ. The sums of products are integers and exact, and rounded once by each scale."""
    if x.values.is_cuda:
        product: Tensor = _own_product(*x, *weight, None, dtype)
        return product
    y = torch.empty(len(x.values), len(weight.values), dtype=dtype)
    for start in range(0, len(y), _ROWS_IN_CACHE):
        rows = slice(start, start + _ROWS_IN_CACHE)
        sums = torch._int_mm(x.values[rows], weight.values.t()).float()
        y[rows] = sums.mul_(x.scales[rows]).mul_(weight.scales.t())
    return y


def _grouped(x: Rounded, weights: Rounded, ends: Tensor, dtype: torch.dtype) -> Tensor:
    y: Tensor = _own_product(*x, *weights, ends, dtype)
    return y


FLOAT8 = Arithmetic("float8", round_rows, multiply_rows, grouped_product)
"""Products of e4m3 values with one scale per row."""
INT8 = Arithmetic("int8-rows", _round_to_int8, _multiply_int8, _grouped, dtype=torch.int8)
"""Products of 8-bit integers with one scale per row, summed in 32 bits."""


@cache
def float8_blocks(rows: int, columns: int) -> Arithmetic:
    """Return the arithmetic of weights with a scale for every block of rows and columns."""
    return Arithmetic(
        "float8-block",
        partial(_round_groups, columns=columns),
        partial(_multiply_blocks, block=(rows, columns)),
        _grouped,
        block=(rows, columns),
    )


class EightBitLinear(nn.Module):
    """A linear layer over a weight in eight bits: it rounds its input, and not its bias."""

    def __init__(
        self, weight: Rounded, bias: nn.Parameter | None, arithmetic: Arithmetic = FLOAT8
    ) -> None:
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
    """The experts of a mixture over weights in eight bits, called as transformers' own module is.

    Weights of gate and up are [E, 2 F, D], those of down [E, D, F].
    """

    def __init__(
        self, experts: Any, gate_up: Rounded, down: Rounded, arithmetic: Arithmetic = FLOAT8
    ) -> None:
        super().__init__()
        self.num_experts = experts.num_experts
        self.act_fn = experts.act_fn
        self.arithmetic = arithmetic
        for name, (values, scales) in (("gate_up_proj", gate_up), ("down_proj", down)):
            setattr(self, name, nn.Parameter(values, requires_grad=False))
            setattr(self, f"{name}_scales", nn.Parameter(scales, requires_grad=False))

    def rounded(self, name: str) -> Rounded:
        """Return the weights ``gate_up_proj`` or ``down_proj`` of all experts."""
        return Rounded(getattr(self, name), getattr(self, f"{name}_scales"))

    def forward(self, x_ND: Tensor, chosen_NK: Tensor, shares_NK: Tensor) -> Tensor:
        """Return the sum of what the chosen experts return of each row, each by its share."""
        by = self.arithmetic
        order, ends = sort_by_expert(chosen_NK, self.num_experts)
        x = by.round(x_ND)
        rows = order // chosen_NK.shape[1]
        spread = Rounded(x.values.view(torch.uint8)[rows].view(x.values.dtype), x.scales[rows])
        gate, up = by.grouped_product(spread, self.rounded("gate_up_proj"), ends, x_ND.dtype).chunk(
            2, dim=-1
        )
        y_SD = by.grouped_product(
            by.round(self.act_fn(gate) * up), self.rounded("down_proj"), ends, x_ND.dtype
        )
        shared_SD = torch.empty_like(y_SD)
        shared_SD[order] = y_SD * shares_NK.flatten()[order, None]
        return shared_SD.view(*chosen_NK.shape, -1).sum(dim=1)


def round_linears(owner: nn.Module) -> None:
    """Round the weights of all linear layers below a module to e4m3: those of a decoder, whose head
    stays as it is.
    """
    # Names alone are listed, so that a layer that is rounded is freed at once.
    for name in [name for name, _ in owner.named_children()]:
        part = getattr(owner, name)
        stacks = expert_weights(part)
        if isinstance(part, nn.Linear):
            _check_widths(name, part.weight)
            setattr(owner, name, EightBitLinear(round_rows(part.weight.detach()), part.bias))
        elif stacks:
            check_experts(name, part, stacks)
            gate_up = round_rows(stacks["gate_up_proj"].detach())
            down = round_rows(stacks["down_proj"].detach())
            setattr(owner, name, EightBitExperts(part, gate_up, down))
        elif type(part).__name__ in _PLAIN_MATRICES:
            raise ModelError(
                f"{name} is a {type(part).__name__}, and float8 was asked for",
                wanted="linear layers, as those of Llama",
                do="use another --dtype",
            )
        else:
            round_linears(part)


def _check_widths(name: str, weight: Tensor) -> None:
    rows, columns = weight.shape[-2:]
    if weight.is_cuda and (rows % WIDTHS or columns % WIDTHS):
        raise ModelError(
            f"{name} has {rows} rows of {columns} numbers, and float8 was asked for",
            wanted=f"multiples of {WIDTHS}, which products in float8 need on CUDA",
            do="use another --dtype",
        )


def expert_weights(part: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a module that are stacked over experts, by name."""
    parameters = part.named_parameters(recurse=False)
    return {name: weight for name, weight in parameters if weight.dim() > 2}


def check_experts(name: str, part: Any, stacks: Mapping[str, Tensor]) -> None:
    """Refuse experts in another layout or with another gate, which would stay unrounded."""
    is_plain = getattr(part, "has_gate", False) and getattr(part, "is_concatenated", False)
    is_other = getattr(part, "has_bias", True) or getattr(part, "is_transposed", True)
    gate = getattr(getattr(part, "_apply_gate", None), "__name__", "")
    has_both = set(stacks) == {"gate_up_proj", "down_proj"}
    if not has_both or not is_plain or is_other or gate != "_default_apply_gate":
        raise ModelError(
            f"{name} is a {type(part).__name__}, and eight bits were asked for",
            wanted="experts with one gate and no bias, as those of Qwen3",
            do="use another --dtype",
        )
    for key, weight in stacks.items():
        _check_widths(f"{name}.{key}", weight)
