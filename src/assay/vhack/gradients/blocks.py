"""Self-attention of a packed batch on a CPU, in float32 and written out in blocks of queries.

A block meets only the keys of its own sample that stand before it. The weights are kept for the backward pass, where
torch's kernel would compute them again; what is kept is bounded. Positions are turned on the way into the layout of the
products, and not in passes of their own. bfloat16 is widened on the way in, which is faster than torch's kernel for it.

Without it the gradients of the bundled model Qwen3 take 1.10 times as long (12 samples of 490 tokens, one thread):

    OMP_NUM_THREADS=1 python benchmarks/vhack_ways.py -o benchmarks/results/vhack_ways_cpu.json

Shapes: N tokens of all samples, H heads of queries, J heads of keys and values, G = H / J, D their width, X queries of
a block. Query heads that share a key head are rows of one product: [J, X·G, D].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from assay.vhack.gradients.batches import Segments

Bounds = Sequence[tuple[int, int]]

_BLOCK = 64
# Heads times tokens of a sample, above which the weights are not kept.
_KEPT_WEIGHTS = 16384


@dataclass(frozen=True, eq=False)
class Turn:
    """How positions turn the heads of one key head, [N, G, D] each; sin has the sign of what it is multiplied with."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, cos_ND: Tensor, sin_ND: Tensor, heads: int, scale: float) -> "Turn":
        """Return the turn of so many heads, times a scale."""
        sign_D = torch.full_like(cos_ND[0], scale)
        sign_D[: len(sign_D) // 2].neg_()
        return cls(*(part[:, None].repeat(1, heads, 1) for part in (cos_ND * scale, sin_ND * sign_D)))


def fits_in_blocks(heads: int, segments: Segments) -> bool:
    """Return whether the weights of the longest sample may be kept for the backward pass."""
    return heads * segments.longest <= _KEPT_WEIGHTS


def attend_in_blocks(
    q_NHD: Tensor, k_NJD: Tensor, v_NJD: Tensor, turns: tuple[Turn, Turn], bounds: Bounds, spans: Bounds
) -> Tensor:
    """Return causal attention within each sample, [N, H, D].

    Args:
        q_NHD: Queries before rotation, in float32 or bfloat16, as keys and values.
        k_NJD: Keys before rotation.
        v_NJD: Values.
        turns: Turns of queries, scaled as the scores, and of keys, in float32.
        bounds: Bounds of the samples.
        spans: Per sample, the rows whose queries matter; the others are zero.
    """
    out: Tensor = _InBlocks.apply(q_NHD, k_NJD, v_NJD, turns, bounds, spans)  # type: ignore[no-untyped-call]
    return out


class _InBlocks(torch.autograd.Function):
    """Causal attention of every sample: queries and keys are turned by their positions, queries scaled."""

    @staticmethod
    def forward(
        ctx: Any, q_NHD: Tensor, k_NJD: Tensor, v_NJD: Tensor, turns: tuple[Turn, Turn], bounds: Bounds, spans: Bounds
    ) -> Tensor:
        groups = k_NJD.shape[1]
        ctx.dtype = q_NHD.dtype
        q_NHD, k_NJD, v_NJD = q_NHD.float(), k_NJD.float(), v_NJD.float()
        q_JNGD = _turned(_by_key_head(q_NHD, groups), turns[0])
        k_JND = _turned(_by_key_head(k_NJD, groups), turns[1])[:, :, 0]
        v_JND = v_NJD.transpose(0, 1).contiguous()
        out_JNGD = torch.zeros_like(q_JNGD)
        ahead = torch.full((_BLOCK, _BLOCK), -torch.inf).triu_(1)[:, None]
        weights = []
        for start, first, last in _blocks(bounds, spans):
            size = last - first
            scores = torch.bmm(q_JNGD[:, first:last].flatten(1, 2), k_JND[:, start:last].transpose(1, 2))
            scores.view(groups, size, -1, last - start)[..., first - start :].add_(ahead[:size, :, :size])
            weights.append(torch.softmax(scores, dim=2))
            out_JNGD[:, first:last].flatten(1, 2).baddbmm_(weights[-1], v_JND[:, start:last], beta=0)
        ctx.save_for_backward(q_JNGD, k_JND, v_JND, out_JNGD, *weights)
        ctx.turns, ctx.blocks = turns, list(_blocks(bounds, spans))
        return _by_token(out_JNGD).to(ctx.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q_JNGD, k_JND, v_JND, out_JNGD, *weights = ctx.saved_tensors
        d_JNGD = _by_key_head(gradients[0].float(), len(k_JND))
        along_JNG1 = torch.linalg.vecdot(d_JNGD, out_JNGD).unsqueeze(3)
        dq_JNGD, dk_JND, dv_JND = (torch.zeros_like(part) for part in (q_JNGD, k_JND, v_JND))
        for (start, first, last), weight in zip(ctx.blocks, weights, strict=True):
            d, along, q = (part[:, first:last].flatten(1, 2) for part in (d_JNGD, along_JNG1, q_JNGD))
            dv_JND[:, start:last].baddbmm_(weight.transpose(1, 2), d)
            scores = torch.bmm(d, v_JND[:, start:last].transpose(1, 2)).sub_(along).mul_(weight)
            dq_JNGD[:, first:last].flatten(1, 2).baddbmm_(scores, k_JND[:, start:last], beta=0)
            dk_JND[:, start:last].baddbmm_(scores.transpose(1, 2), q)
        dq_NHD = _by_token(_turned_back(dq_JNGD, ctx.turns[0]))
        dk_NJD = _by_token(_turned_back(dk_JND.unsqueeze(2), ctx.turns[1]))
        return dq_NHD.to(ctx.dtype), dk_NJD.to(ctx.dtype), dv_JND.transpose(0, 1).to(ctx.dtype), None, None, None


def _blocks(bounds: Bounds, spans: Bounds) -> Iterator[tuple[int, int, int]]:
    """Yield where the sample starts, and from where to where the queries of the block go."""
    for (start, _), (begin, end) in zip(bounds, spans, strict=True):
        for first in range(begin, end, _BLOCK):
            yield start, first, min(first + _BLOCK, end)


def _by_key_head(part_NHD: Tensor, groups: int) -> Tensor:
    """Return heads as [J, N, G, D], in memory of their own."""
    rows, heads, width = part_NHD.shape
    split_NJGD = part_NHD.reshape(rows, groups, heads // groups, width)
    return split_NJGD.transpose(0, 1).clone(memory_format=torch.contiguous_format)


def _by_token(part_JNGD: Tensor) -> Tensor:
    """Return heads as [N, H, D] again."""
    return part_JNGD.transpose(0, 1).flatten(1, 2)


def _turned(part_JNGD: Tensor, turn: Turn) -> Tensor:
    """Return ``x cos + (−x₂, x₁) sin`` for the halves x₁ and x₂ of x."""
    swapped_JNGD = part_JNGD.roll(part_JNGD.shape[-1] // 2, -1)
    return (part_JNGD * turn.cos).addcmul_(swapped_JNGD, turn.sin)


def _turned_back(gradient_JNGD: Tensor, turn: Turn) -> Tensor:
    """Return the gradient of what `_turned` was given."""
    swapped_JNGD = (gradient_JNGD * turn.sin).roll(gradient_JNGD.shape[-1] // 2, -1)
    return swapped_JNGD.addcmul_(gradient_JNGD, turn.cos)
