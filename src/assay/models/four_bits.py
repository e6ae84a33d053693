"""Weights in four bits: how words of 32 bits hold them, and the numbers they stand for.

They are restored when they are loaded, and the model then multiplies in its own dtype, as the
engines that run such checkpoints do: (q − z) · s, where q and z are whole numbers from 0 to 15, and
z and s are those of a group of columns. The scale is cast to the dtype first, and the product is
rounded once.

Shapes: R rows, C columns, G groups of columns, P = eight numbers in a whole number of 32 bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

NUMBERS_OF_A_WORD = 8
"""Numbers of four bits in one of 32."""

CENTRE = 8
"""The zero of weights that are stored without one."""

IN_ORDER = tuple(range(NUMBERS_OF_A_WORD))
"""Place of each of eight neighbours in a word, from the lowest four bits, in most layouts."""

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place of each of eight neighbours in a word of AWQ."""


def unpack_words(words: Tensor, places: Sequence[int] = IN_ORDER) -> Tensor:
    """Return the numbers [..., 8 P] that are packed along the last axis of words [..., P] int32."""
    shifts = torch.tensor([4 * place for place in places], dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & 15).flatten(-2).to(torch.uint8)


def restore(
    numbers_RC: Tensor, zeros_RG: Tensor | int, scales_RG: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the weight [R, C] in a dtype, of numbers from 0 to 15. C is a multiple of G."""
    rows, groups = scales_RG.shape
    numbers_RGS = numbers_RC.view(rows, groups, -1).float()
    zeros = zeros_RG[..., None].float() if isinstance(zeros_RG, Tensor) else float(zeros_RG)
    return ((numbers_RGS - zeros) * scales_RG.to(dtype).float()[..., None]).to(dtype).view(rows, -1)
