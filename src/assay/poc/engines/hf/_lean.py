"""The decoder of the common architectures, written for speed: the same arithmetic, in fewer and larger kernels.

Llama, Mistral, Qwen2 and Qwen3 have one layer, with or without biases and norms of queries and keys. It is written here
once, as a function of tensors, so that one compilation serves all layers. Queries, keys and values are one product, and
so are gate and up. Where only the last position is read, the last layer computes keys and values for every position and
all else for the last one. transformers stays the definition: the tests hold this against it.

Legend of shapes: B nonces, T positions, D hidden size, H query heads, K key heads, G = H / K, E head width, F width of
the MLP; R is the rows of a fused projection.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from assay.models import Model, backbone, decoder_layers, rotate
from assay.models.families import attention_window, family_of

__all__ = ["LeanDecoder", "LeanLayer", "Shape", "lean_decoder"]

Run = Callable[..., Any]


@dataclass(frozen=True)
class Shape:
    """What is the same in every layer: H, K, E, the scale of the scores, epsilon, and the activation of the MLP."""

    heads: int
    key_heads: int
    head_width: int
    scale: float
    epsilon: float
    activation: Callable[[Tensor], Tensor]


class LeanLayer(NamedTuple):
    """The weights of one layer; a bias or norm that the architecture does not have is None."""

    input_norm: Tensor  # D
    qkv: Tensor  # R, D
    qkv_bias: Tensor | None
    query_norm: Tensor | None  # E
    key_norm: Tensor | None
    out: Tensor  # D, H·E
    out_bias: Tensor | None
    mlp_norm: Tensor  # D
    gate_up: Tensor  # R, D
    gate_up_bias: Tensor | None
    down: Tensor  # D, F
    down_bias: Tensor | None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return x / sqrt(mean(x²) + ε) · w over the last axis, in float32 up to the product with the weight."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


def full_layer(
    shape: Shape, h_BTD: Tensor, x_BTD: Tensor, w: LeanLayer, cos_T1E: Tensor, sin_T1E: Tensor, next_norm_D: Tensor
) -> tuple[Tensor, Tensor]:
    """Run one layer for every position.

    Args:
        shape: of the layers.
        h_BTD: the residual stream.
        x_BTD: the same after the layer's input norm.
        w: the layer's weights.
        cos_T1E: cosines of the positions; sines beside them.
        sin_T1E: see above.
        next_norm_D: weight of the norm that follows: the next layer's, or the final one.

    Returns:
        The residual stream after the layer, and the same after the norm that follows.
    """
    batch, length, _ = h_BTD.shape
    qkv_BTHE = functional.linear(x_BTD, w.qkv, w.qkv_bias).view(batch, length, -1, shape.head_width)
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
    h_BTD = h_BTD + functional.linear(a_BHTE.transpose(1, 2).flatten(2), w.out, w.out_bias)
    h_BTD = h_BTD + _mlp(rms_norm(h_BTD, w.mlp_norm, shape.epsilon), w, shape)
    return h_BTD, rms_norm(h_BTD, next_norm_D, shape.epsilon)


def last_layer(
    shape: Shape, h_BTD: Tensor, x_BTD: Tensor, w: LeanLayer, cos_T1E: Tensor, sin_T1E: Tensor, norm_D: Tensor
) -> Tensor:
    """Run the last layer for the last position: its state after the final norm, [B, D] in float32.

    Arguments as of :func:`full_layer`. Only keys and values are computed for every position.
    """
    batch, length, _ = h_BTD.shape
    rows = shape.heads * shape.head_width
    q_bias, kv_bias = (None, None) if w.qkv_bias is None else (w.qkv_bias[:rows], w.qkv_bias[rows:])
    kv_BTKE = functional.linear(x_BTD, w.qkv[rows:], kv_bias).view(batch, length, -1, shape.head_width)
    k, v = kv_BTKE.chunk(2, dim=2)
    k = rotate(_head_norm(k, w.key_norm, shape), cos_T1E, sin_T1E)
    q = functional.linear(x_BTD[:, -1], w.qkv[:rows], q_bias).view(batch, shape.heads, shape.head_width)
    q = rotate(_head_norm(q, w.query_norm, shape), cos_T1E[-1], sin_T1E[-1])
    q_BKGE = q.view(batch, shape.key_heads, -1, shape.head_width)
    scores_BKGT = torch.matmul(q_BKGE, k.permute(0, 2, 3, 1)).float() * shape.scale
    a_BKGE = torch.matmul(scores_BKGT.softmax(dim=-1).to(v.dtype), v.transpose(1, 2))
    h_BD = h_BTD[:, -1] + functional.linear(a_BKGE.flatten(1), w.out, w.out_bias)
    h_BD = h_BD + _mlp(rms_norm(h_BD, w.mlp_norm, shape.epsilon), w, shape)
    return rms_norm(h_BD, norm_D, shape.epsilon).float()


def _head_norm(x: Tensor, weight_E: Tensor | None, shape: Shape) -> Tensor:
    return x if weight_E is None else rms_norm(x, weight_E, shape.epsilon)


def _mlp(x: Tensor, w: LeanLayer, shape: Shape) -> Tensor:
    gate, up = functional.linear(x, w.gate_up, w.gate_up_bias).chunk(2, dim=-1)
    return functional.linear(shape.activation(gate) * up, w.down, w.down_bias)


class LeanDecoder:
    """The layers of a model, ready to run on inputs of one length.

    The weights are the model's own: fused ones take their place in memory, and the model's parameters become views.

    Args:
        model: one that :func:`lean_decoder` found fit.
        seq_len: T.
        wrap: what a function of a layer goes through before it is called, such as ``torch.compile``.
    """

    def __init__(self, model: Model, seq_len: int, wrap: Callable[[Run], Run] = lambda run: run) -> None:
        body: Any = backbone(model.module)
        layers: list[Any] = list(decoder_layers(model.module))
        self._shape = _shape(layers[0])
        self._weights = [_weights(layer) for layer in layers]
        self._norms = [*(weights.input_norm for weights in self._weights), body.norm.weight]
        positions = torch.arange(seq_len, device=model.device)[None]
        like = torch.empty(0, dtype=model.dtype, device=model.device)
        self._angles = tuple(table[0][:, None] for table in body.rotary_emb(like, positions))
        shape = self._shape  # the wrapped functions must not hold the decoder
        self._norm = wrap(lambda x, weight: rms_norm(x, weight, shape.epsilon))
        self._full = wrap(lambda *given: full_layer(shape, *given))
        self._last = wrap(lambda *given: last_layer(shape, *given))

    def last_hidden(self, inputs_BTD: Tensor) -> Tensor:
        """Return the last position's state after the final norm, [B, D] in float32."""
        h, x = self._layers(inputs_BTD, len(self._weights) - 1)
        state_BD: Tensor = self._last(h, x, self._weights[-1], *self._angles, self._norms[-1])
        return state_BD

    def hidden(self, inputs_BTD: Tensor) -> Tensor:
        """Return the states of all positions after the final norm, [B, T, D] in the model's dtype."""
        return self._layers(inputs_BTD, len(self._weights))[1]

    def _layers(self, h: Tensor, count: int) -> tuple[Tensor, Tensor]:
        x = self._norm(h, self._norms[0])
        for weights, next_norm in zip(self._weights[:count], self._norms[1:], strict=False):
            h, x = self._full(h, x, weights, *self._angles, next_norm)
        return h, x


def lean_decoder(model: Model, seq_len: int) -> bool:
    """Say whether a model's layers are those of this module, for sequences of this length.

    They are not where somebody has put something into them: hooks, adapters, another attention, split or
    quantised weights.
    """
    body = backbone(model.module)
    config = model.module.config
    family, window = family_of(config), attention_window(config)
    known = family is not None and family.plain and type(body).__name__ == f"{family.prefix}Model"
    if not known or not type(body).__module__.startswith("transformers.models."):
        return False
    whole = config._attn_implementation == "sdpa" and (window is None or window >= seq_len)
    return whole and all(map(_plain, body.modules()))


def _plain(module: nn.Module) -> bool:
    """Say whether a module computes what its class says, on whole tensors."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
        return False
    whole = all(type(tensor.data) is Tensor for tensor in module.parameters(recurse=False))
    return whole and not hooks and "forward" not in vars(module)


def _shape(layer: Any) -> Shape:
    attention = layer.self_attn
    heads = attention.q_proj.out_features // attention.head_dim
    key_heads = attention.k_proj.out_features // attention.head_dim
    epsilon = float(layer.input_layernorm.variance_epsilon)
    return Shape(heads, key_heads, attention.head_dim, float(attention.scaling), epsilon, layer.mlp.act_fn)


def _weights(layer: Any) -> LeanLayer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, qkv_bias = _fused(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up, gate_up_bias = _fused(mlp.gate_proj, mlp.up_proj)
    query_norm, key_norm = (_tensor(getattr(attention, name, None)) for name in ("q_norm", "k_norm"))
    return LeanLayer(
        input_norm=layer.input_layernorm.weight.data,
        qkv=qkv,
        qkv_bias=qkv_bias,
        query_norm=query_norm,
        key_norm=key_norm,
        out=attention.o_proj.weight.data,
        out_bias=None if attention.o_proj.bias is None else attention.o_proj.bias.data,
        mlp_norm=layer.post_attention_layernorm.weight.data,
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=mlp.down_proj.weight.data,
        down_bias=None if mlp.down_proj.bias is None else mlp.down_proj.bias.data,
    )


def _tensor(norm: nn.Module | None) -> Tensor | None:
    return None if norm is None else cast("Tensor", norm.weight).data


def _fused(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Put the rows of several projections into one matrix, of which their weights become views."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return _joined([linear.weight for linear in linears]), _joined(biases) if len(biases) == len(linears) else None


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return parameters as one tensor, along the first axis, and make them views of it; done twice, nothing moves."""
    first = parts[0].data
    memory = first.untyped_storage()
    rows = [len(part) for part in parts]
    if all(part.data.untyped_storage().data_ptr() == memory.data_ptr() for part in parts):
        return torch.as_strided(first, (sum(rows), *first.shape[1:]), first.stride(), 0)
    whole = torch.cat([part.data for part in parts])
    for part, piece in zip(parts, torch.split(whole, rows), strict=True):
        part.data = piece
    return whole
