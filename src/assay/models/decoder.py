"""The decoder of a causal language model: where its parts are, and what a listed family computes in a layer.

transformers is the definition, and tests hold everything here against it. Llama, Mistral, Qwen2 and Qwen3 have one
layer, with or without biases and norms of queries and keys. :func:`full_layer` is that layer as a function of tensors,
so that one compilation serves all layers, with queries, keys and values as one product and gate and up as another.
Where only the last position is read, :func:`last_layer` computes keys and values for every position and all else for
the last one.

Other forward passes leave things out or carry more along, and share the pieces: the norm, the rotary positions, the
layout of the heads and the gated MLP.

Shapes: B sequences, T positions, D hidden size, H query heads, K key heads, G = H / K, E head width, F width of the
MLP; R is the rows of a fused projection.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from assay.errors import LayersNotFound

__all__ = [
    "LayerWeights",
    "Projection",
    "Rotation",
    "Shape",
    "as_heads",
    "backbone",
    "decoder_layers",
    "full_layer",
    "is_plain",
    "last_layer",
    "layer_shape",
    "layer_weights",
    "rms_norm",
    "rotate",
]

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the angles of positions, each pair's in both of its places; they broadcast with the heads."""

_LISTS_OF_LAYERS = ("layers", "h", "blocks")


def backbone(module: nn.Module) -> nn.Module:
    """Return the decoder without its head; its ``last_hidden_state`` [B, T, D] is taken after the final norm.

    Raises:
        LayersNotFound: The module has no decoder of its own.
    """
    get_decoder = getattr(module, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    if isinstance(decoder, nn.Module) and decoder is not module:
        return decoder
    raise LayersNotFound(
        f"{type(module).__name__} has no decoder below its head",
        wanted="a causal language model of transformers (get_decoder() returns its backbone)",
        do="load the model with assay.models.load_model",
    )


def decoder_layers(module: nn.Module) -> nn.ModuleList:
    """Return the decoder layers in order, exactly ``config.num_hidden_layers`` of them.

    Raises:
        LayersNotFound: The decoder has no list of layers, or their number differs from the configuration.
    """
    decoder = backbone(module)
    lists = [getattr(decoder, name, None) for name in _LISTS_OF_LAYERS]
    layers = next((found for found in lists if isinstance(found, nn.ModuleList)), None)
    expected = getattr(getattr(module, "config", None), "num_hidden_layers", None)
    if layers is not None and len(layers) == expected:
        return layers
    seen = "no list of layers" if layers is None else f"{len(layers)} layers where the configuration says {expected}"
    raise LayersNotFound(
        f"{type(decoder).__name__} has {seen}",
        wanted=f"an nn.ModuleList named {', '.join(_LISTS_OF_LAYERS)} with config.num_hidden_layers entries",
        do="use a model whose decoder layers can be found; hooks on a guess would measure something else",
    )


def is_plain(module: nn.Module) -> bool:
    """Return whether a module and all inside it compute what their classes say, on whole tensors.

    Hooks, forward functions of their own, subclasses of Linear and split or quantised weights all say otherwise.
    """
    for part in module.modules():
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            return False
        if isinstance(part, nn.Linear) and type(part) is not nn.Linear:
            return False
        if any(type(tensor.data) is not Tensor for tensor in part.parameters(recurse=False)):
            return False
    return True


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return x / sqrt(mean(x²) + ε) · w over the last axis, in float32 up to the product with the weight."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + E/2) of the last axis by the angles of their positions (Su et al. 2021).

    Args:
        x: Queries or keys, [..., E].
        cos: Cosines of the angles, each pair's in both of its places; they broadcast with ``x``.
        sin: Sines of the angles, in the layout of the cosines.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def as_heads(
    x: Tensor, width: int, norm: Callable[[Tensor], Tensor] | None = None, rotation: Rotation | None = None
) -> Tensor:
    """Return the output of a projection [..., H·E] as heads [..., H, E], normalised and rotated where asked.

    Args:
        x: Output of ``q_proj``, ``k_proj`` or ``v_proj``.
        width: E, the width of a head.
        norm: Norm of every head, in the families that have one.
        rotation: Rotation of the positions; None leaves the heads as they are, as values are.
    """
    heads = x.view(*x.shape[:-1], -1, width)
    if norm is not None:
        heads = norm(heads)
    return heads if rotation is None else rotate(heads, *rotation)


@dataclass(frozen=True)
class Shape:
    """What is the same in every layer.

    Attributes:
        heads: H, the number of query heads.
        key_heads: K, the number of heads of keys and values.
        head_width: E.
        scale: Scale of the attention scores.
        epsilon: Epsilon of the norms.
        activation: Activation of the gate of the MLP.
    """

    heads: int
    key_heads: int
    head_width: int
    scale: float
    epsilon: float
    activation: Callable[[Tensor], Tensor]


Projection = tuple[Tensor, Tensor | None]
"""Weight [rows, columns] and bias of a projection; where the architecture has no bias it is None."""


class LayerWeights(NamedTuple):
    """The weights of one layer; a norm of heads that the architecture does not have is None."""

    input_norm: Tensor  # D
    qkv: Projection  # R, D
    query_norm: Tensor | None  # E
    key_norm: Tensor | None
    out: Projection  # D, H·E
    mlp_norm: Tensor  # D
    gate_up: Projection  # R, D
    down: Projection  # D, F


def full_layer(
    shape: Shape, h_BTD: Tensor, x_BTD: Tensor, w: LayerWeights, cos_T1E: Tensor, sin_T1E: Tensor, next_norm_D: Tensor
) -> tuple[Tensor, Tensor]:
    """Run one layer for every position.

    Args:
        shape: Shape of the layers.
        h_BTD: Residual stream.
        x_BTD: Residual stream after the layer's input norm.
        w: Weights of the layer.
        cos_T1E: Cosines of the positions.
        sin_T1E: Sines of the positions.
        next_norm_D: Weight of the norm that follows: that of the next layer, or the final one.

    Returns:
        The residual stream after the layer, without and with the norm that follows.
    """
    batch, length, _ = h_BTD.shape
    qkv_BTHE = functional.linear(x_BTD, *w.qkv).view(batch, length, -1, shape.head_width)
    q, k, v = torch.split(qkv_BTHE, [shape.heads, shape.key_heads, shape.key_heads], dim=2)
    q = rotate(_head_norm(q, w.query_norm, shape), cos_T1E, sin_T1E)
    k = rotate(_head_norm(k, w.key_norm, shape), cos_T1E, sin_T1E)
    a_BHTE = functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=True,
        scale=shape.scale,
        enable_gqa=shape.heads != shape.key_heads,
    )
    h_BTD = h_BTD + functional.linear(a_BHTE.transpose(1, 2).flatten(2), *w.out)
    h_BTD = h_BTD + _mlp(rms_norm(h_BTD, w.mlp_norm, shape.epsilon), w, shape)
    return h_BTD, rms_norm(h_BTD, next_norm_D, shape.epsilon)


def last_layer(
    shape: Shape, h_BTD: Tensor, x_BTD: Tensor, w: LayerWeights, cos_T1E: Tensor, sin_T1E: Tensor, norm_D: Tensor
) -> Tensor:
    """Run the last layer for the last position: its state after the final norm, [B, D] in float32.

    Arguments as for :func:`full_layer`. Only keys and values are computed for every position.
    """
    batch, length, _ = h_BTD.shape
    rows = shape.heads * shape.head_width
    kv_BTKE = functional.linear(x_BTD, *_rows(w.qkv, slice(rows, None))).view(batch, length, -1, shape.head_width)
    k, v = kv_BTKE.chunk(2, dim=2)
    k = rotate(_head_norm(k, w.key_norm, shape), cos_T1E, sin_T1E)
    q = functional.linear(x_BTD[:, -1], *_rows(w.qkv, slice(rows)))
    q = q.view(batch, shape.heads, shape.head_width)
    q = rotate(_head_norm(q, w.query_norm, shape), cos_T1E[-1], sin_T1E[-1])
    q_BKGE = q.view(batch, shape.key_heads, -1, shape.head_width)
    scores_BKGT = torch.matmul(q_BKGE, k.permute(0, 2, 3, 1)).float() * shape.scale
    a_BKGE = torch.matmul(scores_BKGT.softmax(dim=-1).to(v.dtype), v.transpose(1, 2))
    h_BD = h_BTD[:, -1] + functional.linear(a_BKGE.flatten(1), *w.out)
    h_BD = h_BD + _mlp(rms_norm(h_BD, w.mlp_norm, shape.epsilon), w, shape)
    return rms_norm(h_BD, norm_D, shape.epsilon).float()


def _rows(projection: Projection, rows: slice) -> Projection:
    weight, bias = projection
    return weight[rows], None if bias is None else bias[rows]


def _head_norm(x: Tensor, weight_E: Tensor | None, shape: Shape) -> Tensor:
    return x if weight_E is None else rms_norm(x, weight_E, shape.epsilon)


def _mlp(x: Tensor, w: LayerWeights, shape: Shape) -> Tensor:
    gate, up = functional.linear(x, *w.gate_up).chunk(2, dim=-1)
    return functional.linear(shape.activation(gate) * up, *w.down)


def layer_shape(layer: Any) -> Shape:
    """Return the shape of a transformers layer of a listed family."""
    attention = layer.self_attn
    heads = attention.q_proj.out_features // attention.head_dim
    key_heads = attention.k_proj.out_features // attention.head_dim
    epsilon = float(layer.input_layernorm.variance_epsilon)
    return Shape(heads, key_heads, attention.head_dim, float(attention.scaling), epsilon, layer.mlp.act_fn)


def layer_weights(layer: Any) -> LayerWeights:
    """Return the weights of a transformers layer of a listed family.

    The weights stay the model's own: fused ones take their place in memory, and the layer's parameters become views.
    """
    attention, mlp = layer.self_attn, layer.mlp
    query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return LayerWeights(
        input_norm=layer.input_layernorm.weight.data,
        qkv=_fused(attention.q_proj, attention.k_proj, attention.v_proj),
        query_norm=None if query_norm is None else query_norm.weight.data,
        key_norm=None if key_norm is None else key_norm.weight.data,
        out=_fused(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight.data,
        gate_up=_fused(mlp.gate_proj, mlp.up_proj),
        down=_fused(mlp.down_proj),
    )


def _fused(*linears: nn.Linear) -> Projection:
    """Put the rows of several projections into one matrix, of which their weights become views."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return _joined([linear.weight for linear in linears]), _joined(biases) if len(biases) == len(linears) else None


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
