"""Rotary positions (Su et al. 2021), in the pairing of Llama and all that follow it."""

import torch
from torch import Tensor

__all__ = ["rotate"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + E/2) of the last axis by the angles of their positions.

    Args:
        x: queries or keys, [..., E].
        cos: of the angles, each pair's in both of its places; shaped to go with ``x``.
        sin: likewise.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
