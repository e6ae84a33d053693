"""Attention over samples that stand end to end in one row: each sees itself only.

transformers looks its attention up by name in a registry. The name here stands for causal attention within the samples
of a batch, whose bounds come along as an argument of the forward pass.

On a GPU the samples are spread out to one length for the product, and gathered afterwards. On a CPU each has its own
product; in float32 that is written out in blocks of queries, which meet only the keys before them. It takes two thirds
of the time of torch's kernel, which recomputes the scores in the backward pass; what is kept for it is bounded.

Shapes: N tokens of all samples, H heads of queries, J heads of keys and values, G = H / J, D their width, T tokens of a
sample, B samples.
"""

from collections.abc import Sequence
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
    """Causal attention of every sample in blocks of queries; the weights are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, q_NHD: Tensor, k_NJD: Tensor, v_NJD: Tensor, bounds: Sequence[tuple[int, int]], scale: float
    ) -> Tensor:
        out_NHD = torch.empty(q_NHD.shape)
        weights = []
        hidden = torch.ones(_BLOCK, _BLOCK, dtype=torch.bool).triu_(1)
        for start, end in bounds:
            k_JTD, v_JTD = k_NJD[start:end].transpose(0, 1), v_NJD[start:end].transpose(0, 1)
            for first in range(start, end, _BLOCK):
                last = min(first + _BLOCK, end)
                seen, size = last - start, last - first
                scores = torch.bmm(_grouped(q_NHD[first:last], len(k_JTD)).mul_(scale), k_JTD[:, :seen].transpose(1, 2))
                own = scores.view(len(k_JTD), -1, size, seen)[..., first - start :]
                own.masked_fill_(hidden[:size, :size], -torch.inf)
                weight = torch.softmax(scores, dim=2)
                _ungroup(torch.bmm(weight, v_JTD[:, :seen]), out_NHD[first:last])
                weights.append(weight)
        ctx.save_for_backward(q_NHD, k_NJD, v_NJD, out_NHD, *weights)
        ctx.bounds, ctx.scale = bounds, scale
        return out_NHD

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (do_NHD,) = gradients
        q_NHD, k_NJD, v_NJD, out_NHD, *weights = ctx.saved_tensors
        along_NH1 = torch.linalg.vecdot(do_NHD, out_NHD).unsqueeze(2)
        dq_NHD, dk_NJD, dv_NJD = torch.empty(q_NHD.shape), torch.zeros(k_NJD.shape), torch.zeros(v_NJD.shape)
        remaining = iter(weights)
        for start, end in ctx.bounds:
            k_JTD, v_JTD, dk_JTD, dv_JTD = (part[start:end].transpose(0, 1) for part in (k_NJD, v_NJD, dk_NJD, dv_NJD))
            for first in range(start, end, _BLOCK):
                last = min(first + _BLOCK, end)
                seen, weight = last - start, next(remaining)
                d_JXD = _grouped(do_NHD[first:last], len(k_JTD))
                dv_JTD[:, :seen] += torch.bmm(weight.transpose(1, 2), d_JXD)
                scores = torch.bmm(d_JXD, v_JTD[:, :seen].transpose(1, 2))
                scores.sub_(_grouped(along_NH1[first:last], len(k_JTD))).mul_(weight).mul_(ctx.scale)
                _ungroup(torch.bmm(scores, k_JTD[:, :seen]), dq_NHD[first:last])
                dk_JTD[:, :seen] += torch.bmm(scores.transpose(1, 2), _grouped(q_NHD[first:last], len(k_JTD)))
        return dq_NHD, dk_NJD, dv_NJD, None, None


def _grouped(part_XHD: Tensor, groups: int) -> Tensor:
    """[X, H, D] to [J, G·X, D]: the query heads that share a key head side by side, in memory of its own."""
    rows, heads, width = part_XHD.shape
    split = part_XHD.view(rows, groups, heads // groups, width).permute(1, 2, 0, 3)
    return split.clone(memory_format=torch.contiguous_format).view(groups, -1, width)


def _ungroup(part: Tensor, out_XHD: Tensor) -> None:
    """The reverse, written to where it belongs."""
    groups, _, width = part.shape
    rows, heads, _ = out_XHD.shape
    out_XHD.view(rows, groups, heads // groups, width).copy_(
        part.view(groups, heads // groups, rows, width).permute(2, 0, 1, 3)
    )
