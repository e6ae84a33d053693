"""Attention over samples that stand end to end in one row: each sees itself only.

transformers looks its attention up by name in a registry. The name here stands for causal attention within the samples
of a batch, whose bounds come along as an argument of the forward pass.

On a GPU the samples are spread out to one length for the product, and gathered afterwards. On a CPU each has its own
product; in float32 that is written out in blocks of queries, which meet only the keys before them. It takes two thirds
of the time of torch's kernel, which recomputes the scores in the backward pass; what is kept for it is bounded.

Shapes: N tokens of all samples, H heads of queries, J heads of keys and values, G = H / J, D their width, T tokens of a
sample, B samples.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from assay.vhack._segments import Segments

__all__ = ["PACKED", "attend", "register"]

PACKED = "assay_packed"
"""The name under which transformers finds `attend`."""

_BLOCK = 64
# Heads times tokens of a sample, above which scores are recomputed in the backward pass and not kept.
_KEPT_SCORES = 16384


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
    longest = max(end - start for start, end in segments.bounds)
    if query.dtype == torch.float32 and query.shape[1] * longest <= _KEPT_SCORES:
        out: Tensor = _InBlocks.apply(q_NHD, k_NJD, v_NJD, segments.bounds, scale)  # type: ignore[no-untyped-call]
        return out[None], None

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


class _InBlocks(torch.autograd.Function):
    """Causal attention of every sample in blocks of queries; the weights are kept for the backward pass.

    Query heads that share a key head are rows of one product: [J, X·G, D] for X queries.
    """

    @staticmethod
    def forward(
        ctx: Any, q_NHD: Tensor, k_NJD: Tensor, v_NJD: Tensor, bounds: Sequence[tuple[int, int]], scale: float
    ) -> Tensor:
        q_JNGD = _by_key_head(q_NHD, k_NJD.shape[1]).mul_(scale)
        k_JND, v_JND = (part.transpose(0, 1).contiguous() for part in (k_NJD, v_NJD))
        out_JNGD = torch.empty_like(q_JNGD)
        hidden = torch.ones(_BLOCK, _BLOCK, dtype=torch.bool).triu_(1)[:, None]
        weights = []
        for start, first, last in _blocks(bounds):
            size = last - first
            scores = torch.bmm(q_JNGD[:, first:last].flatten(1, 2), k_JND[:, start:last].transpose(1, 2))
            own_JXGX = scores.view(len(k_JND), size, -1, last - start)[..., first - start :]
            own_JXGX.masked_fill_(hidden[:size, :, :size], -torch.inf)
            weights.append(torch.softmax(scores, dim=2))
            out_JNGD[:, first:last].flatten(1, 2).copy_(torch.bmm(weights[-1], v_JND[:, start:last]))
        ctx.save_for_backward(q_JNGD, k_JND, v_JND, out_JNGD, *weights)
        ctx.bounds, ctx.scale = bounds, scale
        return _by_token(out_JNGD)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_JNGD, k_JND, v_JND, out_JNGD, *weights = ctx.saved_tensors
        d_JNGD = _by_key_head(gradients[0], len(k_JND))
        along_JNG1 = torch.linalg.vecdot(d_JNGD, out_JNGD).unsqueeze(3)
        dq_JNGD, dk_JND, dv_JND = torch.empty_like(q_JNGD), torch.zeros_like(k_JND), torch.zeros_like(v_JND)
        for (start, first, last), weight in zip(_blocks(ctx.bounds), weights, strict=True):
            d, along, q = (part[:, first:last].flatten(1, 2) for part in (d_JNGD, along_JNG1, q_JNGD))
            dv_JND[:, start:last].baddbmm_(weight.transpose(1, 2), d)
            scores = torch.bmm(d, v_JND[:, start:last].transpose(1, 2)).sub_(along).mul_(weight)
            dq_JNGD[:, first:last].flatten(1, 2).copy_(torch.bmm(scores, k_JND[:, start:last]))
            dk_JND[:, start:last].baddbmm_(scores.transpose(1, 2), q)
        return _by_token(dq_JNGD.mul_(ctx.scale)), dk_JND.transpose(0, 1), dv_JND.transpose(0, 1), None, None


def _blocks(bounds: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Where the sample starts, and from where to where the queries of the block go."""
    for start, end in bounds:
        for first in range(start, end, _BLOCK):
            yield start, first, min(first + _BLOCK, end)


def _by_key_head(part_NHD: Tensor, groups: int) -> Tensor:
    """[J, N, G, D], in memory of its own."""
    rows, heads, width = part_NHD.shape
    split_NJGD = part_NHD.reshape(rows, groups, heads // groups, width)
    return split_NJGD.permute(1, 0, 2, 3).clone(memory_format=torch.contiguous_format)


def _by_token(part_JNGD: Tensor) -> Tensor:
    """Back to [N, H, D]."""
    return part_JNGD.transpose(0, 1).flatten(1, 2)
