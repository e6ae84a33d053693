"""The layers that the engine compiles: a listed family as functions of tensors, so that one compilation serves all.

Queries, keys and values are one product, and gate and up another. Where only the last position is read, the last layer
computes keys and values for every position and all else for the last one.

With the kernels of :mod:`assay.poc.engines.hf.fused`, `prove` is 1.31, 1.19, 1.15 and 1.09 times as fast as the bare
decoder of transformers under `torch.compile`, for the shapes of 0.6, 1, 4 and 8 billion parameters in bfloat16 on an
H200 (`prove_over_compiled` in research/results/gpu_prove_*.json).

Legend of shapes: B nonces, T positions, D hidden size, H query heads, K key heads, G = H / K, E head width, F width of
the MLP; R is the rows of a fused projection.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from assay.models.decoder import (
    MIXTURES,
    DecoderLayer,
    Family,
    Rotation,
    attention_window,
    backbone,
    causal_attention,
    decoder_layers,
    family_of,
    has_hooks,
)
from assay.models.eight_bits import Arithmetic, EightBitExperts, EightBitLinear, Rounded
from assay.models.load import Model

Run = Callable[..., Any]


class Steps(NamedTuple):
    """The functions of which a decoder is made: the first norm, and layers with the norm that follows each of them.

    Attributes:
        norm: Of the residual stream h and a norm; gives h and x, the stream after the norm.
        full: Of h, x, the weights of a layer, the rotation and the next norm; gives h and x.
        final: As ``full``, for the last layer: gives the states after the final norm.
        last: As ``final``, for the last position only, in float32.
    """

    norm: Run
    full: Run
    final: Run
    last: Run


class LeanDecoder:
    """The layers of a model of transformers as functions of tensors, ready to run on inputs of one length.

    The weights are the model's own: fused ones take their place in memory, and the model's parameters become views.

    Args:
        model: Model for which :func:`lean_decoder` is true.
        seq_len: Number of positions, T.
        steps: Maker of the steps from the shape of a layer; None is :func:`plain_steps`.
    """

    def __init__(self, model: Model, seq_len: int, steps: "Callable[[Shape], Steps] | None" = None) -> None:
        body: Any = backbone(model.module)
        layers: list[Any] = list(decoder_layers(model.module))
        cos_1TE, sin_1TE = body.rotary_emb(
            torch.empty(0, dtype=model.dtype, device=model.device), torch.arange(seq_len, device=model.device)[None]
        )
        self._rotation: Rotation = cos_1TE[0][:, None], sin_1TE[0][:, None]
        self._weights = [layer_weights(layer) for layer in layers]
        self._norms = [*(weights.input_layernorm for weights in self._weights), body.norm.weight]
        self._steps = (steps or plain_steps)(layer_shape(layers[0]))

    def last_hidden(self, inputs_BTD: Tensor) -> Tensor:
        """Return the last position's state after the final norm, [B, D] in float32."""
        state_BD: Tensor = self._through(inputs_BTD, self._steps.last)
        return state_BD

    def hidden(self, inputs_BTD: Tensor) -> Tensor:
        """Return the states of all positions after the final norm, [B, T, D] in the model's dtype."""
        states_BTD: Tensor = self._through(inputs_BTD, self._steps.final)
        return states_BTD

    def _through(self, inputs_BTD: Tensor, last: Run) -> Any:
        h, x = self._steps.norm(inputs_BTD, self._norms[0])
        for weights, next_norm in zip(self._weights[:-1], self._norms[1:-1], strict=True):
            h, x = self._steps.full(h, x, weights, self._rotation, next_norm)
        return last(h, x, self._weights[-1], self._rotation, self._norms[-1])


def plain_steps(shape: "Shape", wrap: Callable[[Run], Run] = lambda run: run) -> Steps:
    """Return the steps in torch.

    Args:
        shape: Shape of the layers.
        wrap: Transform of a function before it is first called, such as ``torch.compile``.
    """

    # The wrapped functions must not hold the decoder. The norm that follows a layer is compiled with it.
    def norm(h: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(h, weight, shape.epsilon)

    def full(
        h: Tensor, x: Tensor, weights: LayerWeights, rotation: Rotation, next_norm: Tensor
    ) -> tuple[Tensor, Tensor]:
        h = FusedLayer(shape, weights, rotation)(h, x)
        return h, norm(h, next_norm)

    def last(h: Tensor, x: Tensor, weights: LayerWeights, rotation: Rotation, final_norm: Tensor) -> Tensor:
        return norm(LastLayer(shape, weights, rotation)(h, x), final_norm).float()

    first, layer = wrap(norm), wrap(full)
    return Steps(lambda h, weight: (h, first(h, weight)), layer, lambda *given: layer(*given)[1], wrap(last))


def lean_decoder(model: Model, seq_len: int) -> bool:
    """Return whether a model's layers are those that are compiled here, for sequences of this length.

    They are not after a change from outside: hooks, adapters, another attention, split or quantised weights.
    """
    body = backbone(model.module)
    config = model.config
    family, window = family_of(config) or mixture_of(model), attention_window(config)
    known = family is not None and family.plain and type(body).__name__ == f"{family.prefix}Model"
    if not known or not type(body).__module__.startswith("transformers.models."):
        return False
    whole = config._attn_implementation == "sdpa" and (window is None or window >= seq_len)
    return whole and is_plain(body)


def mixture_of(model: Model) -> Family | None:
    """Return the family of a model whose every layer has a mixture of experts, or None."""
    family = MIXTURES.get(model.config.model_type)
    return family if all(hasattr(layer.mlp, "experts") for layer in decoder_layers(model.module)) else None


def is_plain(module: nn.Module) -> bool:
    """Return whether a module and all inside it compute what their classes say, on whole tensors.

    Hooks, forward functions of their own, subclasses of Linear and split or quantised weights all say otherwise.
    """
    for part in module.modules():
        if has_hooks(part) or "forward" in vars(part):
            return False
        if isinstance(part, nn.Linear) and type(part) is not nn.Linear:
            return False
        if any(type(tensor.data) is not Tensor for tensor in part.parameters(recurse=False)):
            return False
    return _in_one_format(module)


def _in_one_format(module: nn.Module) -> bool:
    """Return whether all products are in the model's dtype, or all in one format of eight bits.

    Where blocks share a scale, rows of several projections are one matrix only if each fills its blocks.
    """
    parts = [part for part in module.modules() if isinstance(part, nn.Linear) or _is_stack(part)]
    rounded = [part for part in module.modules() if isinstance(part, EightBitLinear | EightBitExperts)]
    if not rounded:
        return True
    block = rounded[0].arithmetic.block
    whole = not block or all(part.out_features % block[0] == 0 for part in rounded if isinstance(part, EightBitLinear))
    return whole and not parts and len({part.arithmetic for part in rounded}) == 1


def _is_stack(part: nn.Module) -> bool:
    """Return whether a module holds the weights of experts that are not in eight bits."""
    return not isinstance(part, EightBitExperts) and any(w.dim() > 2 for w in part.parameters(recurse=False))


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return x / sqrt(mean(x²) + ε) · w over the last axis, in float32 up to the product with the weight."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


@dataclass(frozen=True)
class Shape:
    """What is the same in every layer of a model."""

    heads: int  # H
    key_heads: int  # K
    head_width: int  # E
    scale: float  # of the attention scores
    epsilon: float  # of the norms
    activation: Callable[[Tensor], Tensor]  # of the gate of the MLP
    chosen: int = 0  # experts of a position; 0 without a mixture
    shares_of_chosen: bool = False  # whether the shares of the chosen experts add up to one
    arithmetic: Arithmetic | None = None  # of products in eight bits


Projection = tuple[Tensor | Rounded, Tensor | None]
"""Weight [rows, columns] and bias of a projection; where the architecture has no bias it is None."""


class LayerWeights(NamedTuple):
    """The weights of one layer; a norm of heads that the architecture does not have is None."""

    input_layernorm: Tensor  # D
    qkv: Projection  # R, D
    q_norm: Tensor | None  # E
    k_norm: Tensor | None
    o_proj: Projection  # D, H·E
    post_attention_layernorm: Tensor  # D
    gate_up: Projection  # R, D; of a mixture E, R, D
    down_proj: Projection  # D, F; of a mixture E, D, F
    router: Tensor | None = None  # E, D


class FusedLayer(DecoderLayer):
    """A layer for every position; cosines and sines of the positions are [T, 1, E]."""

    def __init__(
        self, shape: Shape, weights: LayerWeights, rotation: Rotation, query_rotation: Rotation | None = None
    ) -> None:
        super().__init__(shape.head_width, rotation, query_rotation)
        self.shape = shape
        self.weights = weights

    @override
    def project(self, name: str, x: Tensor) -> Tensor:
        return projected(x, getattr(self.weights, name), self.shape.arithmetic)

    @override
    def norm(self, name: str, x: Tensor) -> Tensor:
        weight: Tensor | None = getattr(self.weights, name)
        return x if weight is None else rms_norm(x, weight, self.shape.epsilon)

    @override
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(q, k, v, self.shape.scale)

    @override
    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.shape.activation(gate) * up

    @override
    def qkv(self, x: Tensor) -> Iterable[Tensor]:
        widths = [heads * self.head_width for heads in (self.shape.heads, self.shape.key_heads, self.shape.key_heads)]
        return torch.split(self.project("qkv", x), widths, dim=-1)

    @override
    def gate_up(self, x: Tensor) -> Iterable[Tensor]:
        return self.project("gate_up", x).chunk(2, dim=-1)


class LastLayer(FusedLayer):
    """The last layer for the last position; only keys and values are computed for every one."""

    def __init__(self, shape: Shape, weights: LayerWeights, rotation: Rotation) -> None:
        cos_T1E, sin_T1E = rotation
        super().__init__(shape, weights, rotation, (cos_T1E[-1], sin_T1E[-1]))

    @override
    def updated(self, x: Tensor) -> Tensor:
        return x[:, -1]

    @override
    def qkv(self, x: Tensor) -> Iterable[Tensor]:
        rows = self.shape.heads * self.head_width
        q, kv = parted(self.weights.qkv, rows, self.shape.arithmetic)
        kv_BTR = projected(x, kv, self.shape.arithmetic)
        q_BR = projected(self.updated(x), q, self.shape.arithmetic)
        return q_BR, *kv_BTR.chunk(2, dim=-1)

    @override
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return last_attention(q, k, v, self.shape.scale)


def last_attention(q_BHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, scale: float) -> Tensor:
    """Return what the last position's queries gather from all keys, the heads side by side, [B, H·E]."""
    q_BKGE = q_BHE.view(len(q_BHE), k_BTKE.shape[2], -1, q_BHE.shape[-1])
    scores_BKGT = torch.matmul(q_BKGE, k_BTKE.permute(0, 2, 3, 1)).float() * scale
    return torch.matmul(scores_BKGT.softmax(dim=-1).to(v_BTKE.dtype), v_BTKE.transpose(1, 2)).flatten(1)


def projected(x: Tensor | Rounded, projection: Projection, by: Arithmetic | None) -> Tensor:
    """Return x Wᵀ + b; by a weight in eight bits an input is rounded, unless it is already."""
    weight, bias = projection
    if by is None:
        assert isinstance(x, Tensor)
        assert isinstance(weight, Tensor)
        return functional.linear(x, weight, bias)
    assert isinstance(weight, Rounded)
    if isinstance(x, Rounded):
        return by.product(x, weight, bias, torch.bfloat16)
    return by.product(by.round(x), weight, bias, x.dtype)


def parted(projection: Projection, rows: int, by: Arithmetic | None) -> tuple[Projection, Projection]:
    """Return the first rows of a projection's weight and bias, and the others."""
    weight, bias = projection
    cuts = slice(rows), slice(rows, None)
    biases = [None if bias is None else bias[cut] for cut in cuts]
    if not isinstance(weight, Rounded):
        return (weight[cuts[0]], biases[0]), (weight[cuts[1]], biases[1])
    of_scales = rows // by.block[0] if by and by.block else rows
    scales = weight.scales[:of_scales], weight.scales[of_scales:]
    first, second = (Rounded(weight.values[cut], part) for cut, part in zip(cuts, scales, strict=True))
    return (first, biases[0]), (second, biases[1])


def layer_shape(layer: Any) -> Shape:
    """Return the shape of a transformers layer."""
    attention = layer.self_attn
    heads = attention.q_proj.out_features // attention.head_dim
    key_heads = attention.k_proj.out_features // attention.head_dim
    epsilon = float(layer.input_layernorm.variance_epsilon)
    scale, activation = float(attention.scaling), getattr(layer.mlp, "experts", layer.mlp).act_fn
    arithmetic = getattr(attention.q_proj, "arithmetic", None)
    shape = Shape(heads, key_heads, attention.head_dim, scale, epsilon, activation, arithmetic=arithmetic)
    router = getattr(layer.mlp, "gate", None)
    if router is None:
        return shape
    return replace(shape, chosen=int(router.top_k), shares_of_chosen=bool(router.norm_topk_prob))


def layer_weights(layer: Any) -> LayerWeights:
    """Return the weights of a transformers layer; fused ones take their place, and its parameters become views."""
    attention, mlp = layer.self_attn, layer.mlp
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    mixture = hasattr(mlp, "experts")
    return LayerWeights(
        input_layernorm=layer.input_layernorm.weight.data,
        qkv=_fused(attention.q_proj, attention.k_proj, attention.v_proj),
        q_norm=None if q_norm is None else q_norm.weight.data,
        k_norm=None if k_norm is None else k_norm.weight.data,
        o_proj=_fused(attention.o_proj),
        post_attention_layernorm=layer.post_attention_layernorm.weight.data,
        gate_up=_stacked(mlp.experts, "gate_up_proj") if mixture else _fused(mlp.gate_proj, mlp.up_proj),
        down_proj=_stacked(mlp.experts, "down_proj") if mixture else _fused(mlp.down_proj),
        router=mlp.gate.weight.data if mixture else None,
    )


def _stacked(experts: Any, name: str) -> Projection:
    """Return the weights of all experts."""
    return experts.rounded(name) if isinstance(experts, EightBitExperts) else getattr(experts, name).data, None


def _fused(*linears: nn.Linear | EightBitLinear) -> Projection:
    """Put the rows of several projections into one matrix, of which their weights become views."""
    weight = _joined([linear.weight for linear in linears])
    scales = [linear.scales for linear in linears if isinstance(linear, EightBitLinear)]
    biases = [linear.bias for linear in linears if linear.bias is not None]
    bias = _joined(biases) if len(biases) == len(linears) else None
    return Rounded(weight, _joined(scales)) if scales else weight, bias


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return parameters as one tensor, along the first axis, and make them views of it; done twice, nothing moves."""
    rows, first = [len(part) for part in parts], parts[0].data
    starts = [part.data.data_ptr() for part in parts]
    ends = [start + part.data.nbytes for start, part in zip(starts, parts, strict=True)]
    in_one = {part.data.untyped_storage().data_ptr() for part in parts}
    if len(in_one) == 1 and starts[1:] == ends[:-1]:
        return torch.as_strided(first, (sum(rows), *first.shape[1:]), first.stride(), first.storage_offset())
    whole = torch.cat([part.data for part in parts])
    for part, piece in zip(parts, torch.split(whole, rows), strict=True):
        part.data = piece
    return whole
