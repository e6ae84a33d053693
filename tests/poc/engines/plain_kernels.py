"""What the kernels between products compute, in torch: their definition, from the project's own
formulas.
"""

import torch
from torch import Tensor
from torch.nn import functional

from assay.models.decoder import rotate
from assay.models.eight_bits import Arithmetic, Rounded

__all__ = ["combined", "gated", "normalised", "rounded", "spread", "turned"]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


def rounded(x: Tensor, by: Arithmetic) -> Rounded:
    return by.round(x)


def normalised(
    h: Tensor, update: Tensor | None, weight: Tensor, eps: float, by: Arithmetic | None
) -> tuple[Tensor, Tensor | Rounded]:
    total = h if update is None else h + update
    x = rms_norm(total, weight, eps)
    return total, by.round(x) if by else x


def turned(
    x: Tensor,
    norms,
    rotation,
    eps: float,
    *,
    queries: int,
    heads: int,
    width: int,
    first_position: int = 0,
):
    cosines, sines = (
        table[first_position:] if x.dim() > 2 else table[first_position] for table in rotation
    )
    part = x.view(*x.shape[:-1], -1, width)[..., :heads, :]
    q = part[..., :queries, :]
    k = part[..., queries:, :]
    if norms[0] is not None:
        q = rms_norm(q, norms[0], eps)
        k = rms_norm(k, norms[1], eps)
    part.copy_(rotate(torch.cat([q, k], dim=-2), cosines, sines))


def gated(x: Tensor, by: Arithmetic | None) -> Tensor | Rounded:
    gate, up = x.chunk(2, dim=-1)
    values = functional.silu(gate) * up
    return by.round(values) if by else values


def spread(x: Tensor, places: Tensor, by: Arithmetic | None) -> Tensor | Rounded:
    sources = torch.empty_like(places)
    sources[places] = torch.arange(len(places), device=x.device) // (len(places) // len(x))
    return by.round(x[sources]) if by else x[sources]


def combined(x: Tensor, places: Tensor, shares: Tensor) -> Tensor:
    return (x[places].view(*shares.shape, -1) * shares[..., None]).sum(dim=1)
