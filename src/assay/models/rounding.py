"""Weights of 16 bits rounded to float8: an honest configuration that a network may agree on.

Inputs of the rounded layers are rounded too, with a scale for every position
(:mod:`assay.models.eight_bits`).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from assay.errors import ModelError
from assay.models.eight_bits import WIDTHS, EightBitExperts, EightBitLinear, round_rows


def quantise(owner: nn.Module) -> None:
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
        else:
            quantise(part)


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
