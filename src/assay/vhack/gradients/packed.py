"""Decoder layers of the listed families over samples that stand end to end in one row: each sample sees itself only.

:class:`PackedLayers` makes forward functions that take the place of those of transformers. Embeddings, rotary tables,
the final norm and the head stay with transformers. The projections are called as modules, so that what replaces their
forward functions, and hooks on them, take part.

On a GPU the samples are spread out to one length for attention, and gathered afterwards. On a CPU attention is written
out in blocks of queries, in float32: a block meets only the keys of its own sample that stand before it. The weights
are kept for the backward pass, where torch's kernel would compute them again; what is kept is bounded. Positions are
turned on the way into the layout of the products. bfloat16 is widened on the way in, which is faster than torch's
kernel for it.

Measured (research/results/vhack_ways_cpu.json; bundled Qwen3, one CPU thread): padded as transformers has
it, gradients take 1.23 times as long; with the last layer for every token 1.08 times; without the blocks 1.10 times
(12 samples of 490 tokens). On an H200 packing alone takes Qwen3-4B from 0.93 to 0.80 s (vhack_gradients_h200_bfloat16).

Shapes: N tokens of all samples, M of them that predict a completion token, B samples, T tokens of a sample, H heads of
queries, J heads of keys and values, G = H / J, D their width (or that of hidden states),
X queries of a block. Query heads that share a key head are rows of one product: [J, X·G, D].
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from assay.models.decoder import ModuleLayer, Rotation, causal_attention
from assay.vhack.gradients.batches import Batch, Segments
from assay.vhack.gradients.fused import Gate

Bounds = Sequence[tuple[int, int]]
PACKED = "assay_packed"
"""Name of the attention of these layers, under which transformers makes no mask."""

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


class _InBlocks(torch.autograd.Function):
    """Causal attention within each sample, [N, H, D], of queries, keys and values in float32 or bfloat16.

    Queries and keys come before rotation; the turns rotate both, and scale the queries. Only queries of ``spans``, one
    per sample, matter; the others get zeros.
    """

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


def register() -> None:
    """Make the name known to transformers, which makes masks only for attention that has a mask function."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, attend)


class PackedLayers:
    """Makes the forward functions of the layers of one copy of a model, which share the batch and the rotations.

    Attention is one product for all samples, or on a CPU written out ``in_blocks``.
    """

    def __init__(self, batch: Callable[[], Batch], kernels: ModuleType | None, *, in_blocks: bool) -> None:
        self._batch = batch
        self.kernels, self.in_blocks = kernels, in_blocks
        self._turned: Rotation | None = None

    def forward(self, layer: Any, *, labels_only: bool) -> Callable[..., Tensor]:
        """Return the forward function of a layer.

        With ``labels_only`` the M tokens that predict a completion token are all that matters after it: the others have
        keys and values only, and leave it as zeros.
        """

        def forward(hidden_states: Tensor, *, position_embeddings: Rotation, **_: Any) -> Tensor:
            batch = self._batch()
            rows = batch.label_rows if labels_only else None
            packed = _PackedLayer(self, layer, batch, rows, position_embeddings)
            x_1MD = packed(hidden_states, layer.input_layernorm(hidden_states))
            return _among_zeros(x_1MD, rows, hidden_states.shape[1])

        return forward

    def turns(self, rotation: Rotation, heads: int, scale: float) -> tuple[Turn, Turn]:
        """Return the turns of queries and keys, which all layers of a forward pass share, by one rotation object.

        The rotation is cosines and sines of the positions, [1, N, D] each; a key head has ``heads`` query heads.
        """
        if self._turned is not rotation:
            cos_ND, sin_ND = rotation[0][0].float(), rotation[1][0].float()
            self._turned = rotation
            self._turns = Turn.of(cos_ND, sin_ND, heads, scale), Turn.of(cos_ND, sin_ND, 1, 1.0)
        return self._turns


class _PackedLayer(ModuleLayer):
    """A layer for one batch; after it only the rows ``rows`` matter, or all where it is None."""

    def __init__(self, layers: PackedLayers, layer: Any, batch: Batch, rows: Tensor | None, rotation: Rotation) -> None:
        self.layers, self.batch, self.rows, self.tables = layers, batch, rows, rotation
        heads = layer.self_attn.config.num_attention_heads
        self.in_blocks = layers.in_blocks and heads * batch.segments.longest <= _KEPT_WEIGHTS
        super().__init__(layer, None if self.in_blocks else (rotation[0][0, :, None], rotation[1][0, :, None]))

    def updated(self, x: Tensor) -> Tensor:
        return x if self.rows is None else x.squeeze(0).index_select(0, self.rows)[None]

    def qkv(self, x: Tensor) -> Iterable[Tensor]:
        q, k, v = super().qkv(x)
        return _among_zeros(q, self.rows, x.shape[1]), k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_NHD, k_NJD, v_NJD = q.squeeze(0), k.squeeze(0), v.squeeze(0)
        segments, scale = self.batch.segments, self.layer.self_attn.scaling
        if self.in_blocks:
            turns = self.layers.turns(self.tables, q_NHD.shape[1] // k_NJD.shape[1], scale)
            spans = segments.bounds if self.rows is None else self.batch.label_spans
            out_NHD: Tensor = _InBlocks.apply(q_NHD, k_NJD, v_NJD, turns, segments.bounds, spans)  # type: ignore[no-untyped-call]
        else:
            out_NHD = attend(q_NHD, k_NJD, v_NJD, segments, scale)
        return self.updated(out_NHD.reshape(1, len(out_NHD), -1))

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.layers.kernels is None or type(self.layer.mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
            return super().gated(gate, up)
        neurons: Tensor = Gate.apply(gate, up, self.layers.kernels)  # type: ignore[no-untyped-call]
        return neurons


def _among_zeros(x_1MD: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """Return rows at their places among N rows, [1, N, D]; the others are zero."""
    if rows is None:
        return x_1MD
    return x_1MD.new_zeros(1, count, *x_1MD.shape[2:]).index_copy_(1, rows, x_1MD)


def attend(q_NHD: Tensor, k_NJD: Tensor, v_NJD: Tensor, segments: Segments, scale: float) -> Tensor:
    """Return causal attention within each sample, [N, H, D], of rotated queries and keys.

    All samples are padded on the right with zeros, which no row of a sample sees.
    """
    count, places = len(segments.bounds), segments.padded_places

    def spread(part: Tensor) -> Tensor:
        return _among_zeros(part[None], places, count * segments.longest).view(count, -1, *part.shape[1:])

    out_BTO = causal_attention(spread(q_NHD), spread(k_NJD), spread(v_NJD), scale)
    gathered: Tensor = _Gather.apply(out_BTO.flatten(0, 1), places)  # type: ignore[no-untyped-call]
    return gathered.view(q_NHD.shape)


class _Gather(torch.autograd.Function):
    """The rows at some places; the gradient of the others is zero, which needs no sum over places."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.count = len(rows)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (gradient,) = gradients
        (places,) = ctx.saved_tensors
        return _among_zeros(gradient[None], places, ctx.count)[0], None
