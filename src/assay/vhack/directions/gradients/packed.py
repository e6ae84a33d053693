"""Decoder layers of the listed families over samples end to end, each seeing itself only.

:func:`packed_forward` makes forward functions that take the place of those of transformers.
Embeddings, rotary tables, the final norm and the head stay with transformers. The projections are
called as modules, so that what replaces their forward functions, and hooks on them, take part.

For attention the samples are spread out to one length, and gathered afterwards.

Measured (research/results/vhack_ways_cpu.json; bundled Qwen3, one CPU thread, when attention was
faster by a tenth of the whole): padded as transformers has it, gradients take 1.23 times as long;
with the last layer for every token 1.08 times. On an H200 packing alone takes Qwen3-4B from 0.93 to
0.80 s (vhack_gradients_h200_bfloat16).

Shapes: N tokens of all samples, M of them that predict a completion token, B samples, T tokens of a
    sample, H heads of
queries, J heads of keys and values, D their width (or that of hidden states), O = H·D.
"""

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from assay.models.decoder import ModuleLayer, Rotation, causal_attention
from assay.vhack.directions.gradients.batches import SampleBatch, Segments
from assay.vhack.directions.gradients.gradient_operations import GatedActivation

PACKED = "assay_packed"
"""Name of the attention of these layers, under which transformers makes no mask."""


def register() -> None:
    """Register the attention with transformers, which then makes no mask for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, attend)


def packed_forward(
    layer: Any,
    get_batch: Callable[[], SampleBatch],
    kernels: ModuleType | None,
    *,
    labels_only: bool,
) -> Callable[..., Tensor]:
    """Return the forward function of a layer of a model that computes one batch at a time.

    With ``labels_only`` the M tokens that predict a completion token are all that matters after
    it: the others have keys and values only, and leave it as zeros.
    """

    def forward(hidden_states: Tensor, *, position_embeddings: Rotation, **_: Any) -> Tensor:
        batch = get_batch()
        rows = batch.label_rows if labels_only else None
        packed = _PackedLayer(layer, batch.segments, rows, position_embeddings, kernels)
        x_1MD = packed(hidden_states, layer.input_layernorm(hidden_states))
        return _among_zeros(x_1MD, rows, hidden_states.shape[1])

    return forward


class _PackedLayer(ModuleLayer):
    """A layer for one batch; after it only the rows ``rows`` matter, or all where it is None."""

    def __init__(
        self,
        layer: Any,
        segments: Segments,
        rows: Tensor | None,
        rotation: Rotation,
        kernels: ModuleType | None,
    ) -> None:
        self.segments = segments
        self.rows = rows
        self.kernels = kernels
        super().__init__(layer, (rotation[0][0, :, None], rotation[1][0, :, None]))

    def updated(self, x: Tensor) -> Tensor:
        return x if self.rows is None else x.squeeze(0).index_select(0, self.rows)[None]

    def qkv(self, x: Tensor) -> Iterable[Tensor]:
        q, k, v = super().qkv(x)
        return _among_zeros(q, self.rows, x.shape[1]), k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out_NHD = attend(
            q.squeeze(0), k.squeeze(0), v.squeeze(0), self.segments, self.layer.self_attn.scaling
        )
        return self.updated(out_NHD.reshape(1, len(out_NHD), -1))

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.kernels is None or type(self.layer.mlp.act_fn).__name__ not in (
            "SiLU",
            "SiLUActivation",
        ):
            return super().gated(gate, up)
        return cast("Tensor", GatedActivation.apply(gate, up, self.kernels))  # type: ignore[no-untyped-call]


def _among_zeros(x_1MD: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """Return rows at their places among N rows, [1, N, D]; the others are zero."""
    if rows is None:
        return x_1MD
    return x_1MD.new_zeros(1, count, *x_1MD.shape[2:]).index_copy_(1, rows, x_1MD)


def attend(q_NHD: Tensor, k_NJD: Tensor, v_NJD: Tensor, segments: Segments, scale: float) -> Tensor:
    """Return causal attention within each sample, [N, H, D], of rotated queries and keys.

    All samples are padded on the right with zeros, which no row of a sample sees.
    """
    count = len(segments.bounds)
    places = segments.padded_places

    def spread(part: Tensor) -> Tensor:
        return _among_zeros(part[None], places, count * segments.longest).view(
            count, -1, *part.shape[1:]
        )

    out_BTO = causal_attention(spread(q_NHD), spread(k_NJD), spread(v_NJD), scale)
    gathered: Tensor = _Gather.apply(out_BTO.flatten(0, 1), places)  # type: ignore[no-untyped-call]
    return gathered.view(q_NHD.shape)


class _Gather(torch.autograd.Function):
    """The rows at some places; the gradient of the others is zero, without a scatter-add."""

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
