"""Weights in four bits with a scale for a group of columns, in the three layouts in which checkpoints pack them.

Such a weight is (q − z) · s: q and z are whole numbers from 0 to 15, and z and s are those of the column's group. It is
restored when it is loaded, and the model then multiplies in its own dtype, as the engines that run such checkpoints do:
the inputs are not rounded. The scale is cast to the dtype of the model first, and the product is rounded to it once.

Legend of shapes: R rows, C columns, G groups of columns, P = eight numbers in a whole number of 32 bits.
"""

import torch
from torch import Tensor

OF_A_WORD = 8
"""Numbers of four bits in one of 32."""

CENTRE = 8
"""The zero of weights that are stored without one."""

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place of each of eight neighbours in a word of AWQ, from the lowest four bits; other layouts keep their order."""


def unpacked(words: Tensor, places: tuple[int, ...] = tuple(range(OF_A_WORD))) -> Tensor:
    """Return the numbers [..., 8 P] that are packed along the last axis of words, [..., P] int32.

    Args:
        words: Words as they are stored.
        places: Place of each of the eight numbers in its word.
    """
    shifts = torch.tensor([4 * place for place in places], dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & 15).flatten(-2).to(torch.uint8)


def restored(numbers_RC: Tensor, zeros_RG: Tensor | int, scales_RG: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight [R, C] in a dtype.

    Args:
        numbers_RC: Numbers from 0 to 15.
        zeros_RG: Zero of every group, or of all.
        scales_RG: Scale of every group. C is a multiple of G.
        dtype: Dtype of the model.
    """
    rows, groups = scales_RG.shape
    numbers_RGS = numbers_RC.view(rows, groups, -1).float()
    zeros = zeros_RG[..., None].float() if isinstance(zeros_RG, Tensor) else float(zeros_RG)
    return ((numbers_RGS - zeros) * scales_RG.to(dtype).float()[..., None]).to(dtype).view(rows, -1)
