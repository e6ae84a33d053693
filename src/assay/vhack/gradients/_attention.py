"""Attention over samples that stand end to end in one row: each sees itself only.

transformers looks its attention up by name in a registry. The name here stands for causal attention within the samples
of a batch, whose bounds come along as an argument of the forward pass.

On a GPU the samples are spread out to one length for the product, and gathered afterwards. On a CPU each has its own
product.

Shapes: N tokens of all samples, H heads of queries, J heads of keys and values, D their width, T tokens of a sample, B
samples.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from assay.vhack.gradients._segments import Segments

__all__ = ["PACKED", "attend", "register"]

PACKED = "assay_packed"
"""The name under which transformers finds `attend`."""


def register() -> None:
    """Make `attend` known to transformers. A name without a mask function of its own gets no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, attend)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments,
    together: bool,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sample, as transformers calls it.

    Args:
        module: the attention module; not used.
        query: [1, H, N, D].
        key: [1, J, N, D].
        value: [1, J, N, D].
        attention_mask: None.
        segments: the bounds of the samples.
        together: one product for all samples.
        scaling: of the scores; None is ``1 / √D``.

    Returns:
        [1, N, H, D], and no weights.
    """
    assert attention_mask is None
    assert len(query) == 1
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    q_NHD, k_NJD, v_NJD = (part[0].transpose(0, 1) for part in (query, key, value))
    if together:
        return _spread_out(q_NHD, k_NJD, v_NJD, segments, scale)[None], None

    def one(start: int, end: int) -> Tensor:
        q_HTD, k_JTD, v_JTD = (part[start:end].transpose(0, 1) for part in (q_NHD, k_NJD, v_NJD))
        return _product(q_HTD[None], k_JTD[None], v_JTD[None], scale)[0].transpose(0, 1)

    return torch.cat([one(start, end) for start, end in segments.bounds])[None], None


def _product(q_BHTD: Tensor, k_BJTD: Tensor, v_BJTD: Tensor, scale: float) -> Tensor:
    grouped = q_BHTD.shape[1] != k_BJTD.shape[1]
    out: Tensor = functional.scaled_dot_product_attention(
        q_BHTD, k_BJTD, v_BJTD, is_causal=True, scale=scale, enable_gqa=grouped
    )
    return out


def _spread_out(q_NHD: Tensor, k_NJD: Tensor, v_NJD: Tensor, segments: Segments, scale: float) -> Tensor:
    padded, real = segments.padding()
    shape = (len(segments.bounds), -1)

    def spread(part: Tensor) -> Tensor:
        out: Tensor = _Spread.apply(part, padded, real)  # type: ignore[no-untyped-call]
        return out.view(*shape, *part.shape[1:]).transpose(1, 2)

    out_BHTD = _product(spread(q_NHD), spread(k_NJD), spread(v_NJD), scale)
    gathered: Tensor = _Gather.apply(out_BHTD.transpose(1, 2).flatten(0, 1), real)  # type: ignore[no-untyped-call]
    return gathered


class _Spread(torch.autograd.Function):
    """Rows spread out, some of them to several places.

    No row sees what stands to its right, so the gradient of all places behind the end of a sample is zero, and it is
    enough to gather the others: no sum over places is needed.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, padded: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(real)
        return rows.index_select(0, padded)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        (real,) = ctx.saved_tensors
        return gradient.index_select(0, real), None, None


class _Gather(torch.autograd.Function):
    """The rows at the real places; the gradient of the others is zero."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(real)
        ctx.count = len(rows)
        return rows.index_select(0, real)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (gradient,) = gradients
        (real,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.count, *gradient.shape[1:]).index_copy_(0, real, gradient), None
